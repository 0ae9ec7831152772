"""Small encoders with random weights, saved as their libraries save them."""

import json
from pathlib import Path

import open_clip
import torch
from builders import EMBED_WIDTH, IMAGE_SIZE, MAX_TOKENS, PATCH_SIZE, TEXT_WIDTH, VISION_WIDTH, model_config, shake
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from sycoca.data.tokenizer import build_tokenizer, train_word_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.pretrained import PretrainedConfig, save_description

TEXTS = ["a red dog", "a dog on the grass that runs and runs and runs", "blue"]
HEAD_WIDTH = 4


def save_own(folder: Path, *, parts: list[Part] | None = None, seed: int = 0, log_scale: float = 1.5) -> Path:
    """A checkpoint folder of ours, with the contrastive objective's own parameter."""
    parts = parts or ["text", "contrast", "text_decoder"]
    train_word_tokenizer(TEXTS, folder / "tokenizer")
    tokenizer = build_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    model = SyCoCa(model_config(), vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=set(parts))
    shake(model)
    weights = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file({**weights, "objectives.itc.log_logit_scale": torch.tensor([log_scale])}, folder / "model.safetensors")
    config = PretrainedConfig(
        model=model_config(), parts=parts, transform=TransformConfig(size=IMAGE_SIZE), relevance=RelevanceConfig(),
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    save_description(folder, tokenizer, config)
    return folder


def save_open_clip(folder: Path, *, seed: int = 0) -> Path:
    """A ViT with open_clip's description, for `open_clip:local-dir:`; images are squashed."""
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "width": VISION_WIDTH, "layers": 2, "head_width": HEAD_WIDTH}
    text = {"context_length": MAX_TOKENS, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 3, "layers": 2}
    torch.manual_seed(seed)
    model = open_clip.CLIP(EMBED_WIDTH, vision, text)
    shake(model)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    model_cfg = {"embed_dim": EMBED_WIDTH, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": settings}))
    return folder


def save_transformers(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel with its image processor and a tokenizer of the words of TEXTS."""
    train_word_tokenizer(TEXTS, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[BOS]", "[EOS]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ids)
    tokenizer.save_pretrained(str(folder))
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**layers, "hidden_size": TEXT_WIDTH, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    text |= {"bos_token_id": ids[0][1], "eos_token_id": ids[1][1], "pad_token_id": tokenizer.pad_token_id}
    vision = {**layers, "hidden_size": VISION_WIDTH, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED_WIDTH))
    shake(model)
    model.save_pretrained(folder)
    sides = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    CLIPImageProcessor(**sides).save_pretrained(folder)
    return folder
