"""open_clip's models and transformers' CLIP as towers: what encodes images, texts and patches, and how images are prepared."""

import warnings
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from sycoca.captioners.encoder import Towers
from sycoca.config import parse_config
from sycoca.data.transforms import TransformConfig
from sycoca.types import CheckpointError, ConfigError

_RESIZE_MODES = {"shortest": "center_crop", "squash": "squash"}  # open_clip's word: ours
_SCHEMES = ("local-dir:", "hf-hub:")  # of open_clip's names that carry their own weights


def open_clip_towers(name: str) -> Towers:
    """`MODEL/TAG_OR_FILE`, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`. Raises ConfigError, CheckpointError."""
    architecture, weights = _split_name(name)
    try:
        model: Any = _create_open_clip(architecture, weights)
        tokenizer: Any = open_clip.get_tokenizer(architecture)
    except (RuntimeError, ValueError, OSError, UserWarning) as error:
        raise CheckpointError(f"open_clip:{name}: open_clip cannot load it: {error}") from error

    def encode_text(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(next(model.parameters()).device), normalize=False)

    return Towers(
        module=model, image=lambda image_BCHW: model.encode_image(image_BCHW, normalize=False), text=encode_text,
        patches=lambda image_BCHW: _open_clip_patches(model.visual, image_BCHW),
        transform=_open_clip_transform(open_clip.get_model_preprocess_cfg(model), name),
        logit_scale=model.logit_scale.exp().item(),
    )  # fmt: skip


def transformers_towers(name: str) -> Towers:
    """A transformers CLIPModel by name or folder, with tokenizer and image processor. Raises CheckpointError, ConfigError."""
    from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise ConfigError(f"transformers:{name}: expected a CLIP, found the model type {kind!r}")
        model: Any = CLIPModel.from_pretrained(name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        processor = CLIPImageProcessor.from_pretrained(name)
    except (OSError, KeyError) as error:
        raise CheckpointError(f"transformers:{name}: transformers cannot load it: {error}") from error
    max_tokens = model.config.text_config.max_position_embeddings

    def encode_text(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt").to(model.device)
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return model.text_projection(pooled)

    return Towers(
        module=model,
        image=lambda image_BCHW: model.visual_projection(model.vision_model(pixel_values=image_BCHW).pooler_output),
        text=encode_text,
        patches=lambda image_BCHW: model.vision_model(pixel_values=image_BCHW).last_hidden_state,
        transform=_transformers_transform(processor.to_dict(), name),
        logit_scale=model.logit_scale.exp().item(),
    )


def _split_name(name: str) -> tuple[str, str | None]:
    """Architecture and weights. A name with its own weights stays whole."""
    if name.startswith(_SCHEMES):
        return name, None
    architecture, _, weights = name.partition("/")
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: no such model"
        raise ConfigError(f"open_clip:{name}: expected MODEL/WEIGHTS, a tag or a file; tags of {architecture}: {tags}")
    return architecture, weights


def _create_open_clip(architecture: str, weights: str | None) -> nn.Module:
    """Built with the activation that its weights were trained with: open_clip only warns where they differ."""
    known = open_clip.get_pretrained_cfg(architecture, weights) if weights is not None else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        return open_clip.create_model(
            architecture, pretrained=weights, require_pretrained=True, force_quick_gelu=bool(known.get("quick_gelu", False))
        )


def _open_clip_patches(visual: nn.Module, image_BCHW: Tensor) -> Tensor:
    """The last block's states before the final norm, the class token first where there is one."""
    if not isinstance(visual, VisionTransformer | TimmModel):
        raise ConfigError(f"patch states: expected a Vision Transformer, found open_clip's {type(visual).__name__}")
    found: Any = visual.forward_intermediates(
        image_BCHW, indices=1, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    prefix = found.get("image_intermediates_prefix", [])
    return torch.cat([*prefix, *found["image_intermediates"]], dim=1)


def _open_clip_transform(settings: Mapping[str, Any], name: str) -> TransformConfig:
    if settings["resize_mode"] not in _RESIZE_MODES:
        known = ", ".join(_RESIZE_MODES)
        raise ConfigError(f"open_clip:{name}: images are resized by {settings['resize_mode']!r}; supported are {known}")
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ConfigError(f"open_clip:{name}: expected square images, found {height} x {width}")
    tree = {"size": height, "eval": _RESIZE_MODES[settings["resize_mode"]], "interpolation": settings["interpolation"]}
    return parse_config(TransformConfig, {**tree, "mean": settings["mean"], "std": settings["std"]}, source=f"open_clip:{name}")


def _transformers_transform(settings: Mapping[str, Any], name: str) -> TransformConfig:
    """Of CLIP's image processor: shortest side and centre crop to one size, or squashed to a square."""
    size, crop = settings["size"], settings["crop_size"]
    short = size.get("shortest_edge")
    sides = {crop["height"], crop["width"], short} if short else {size["height"], size["width"]}
    if len(sides) > 1 or not (settings["do_resize"] and settings["do_normalize"] and settings["do_center_crop"]):
        raise ConfigError(f"transformers:{name}: expected images resized and cropped to one size, found {size} and {crop}")
    tree = {
        "size": sides.pop(), "eval": "center_crop" if short else "squash", "mean": settings["image_mean"],
        "std": settings["image_std"], "interpolation": Image.Resampling(settings["resample"]).name.lower(),
    }  # fmt: skip
    return parse_config(TransformConfig, tree, source=f"transformers:{name}")
