"""Where a fine-tuning starts: a checkpoint's model, with the parts the task needs, at the task's resolution."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from sycoca.config import Config, load_config
from sycoca.data.stream import LoaderConfig
from sycoca.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.log import logger
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.pretrained import MODEL_PREFIX, PretrainedConfig, find_checkpoint
from sycoca.types import CheckpointError, ConfigError

PURPOSE: dict[Part, str] = {
    "text": "read text",
    "contrast": "compare images with texts",
    "text_decoder": "write or answer",
}


class StartConfig(Config):
    """The model of a checkpoint, changed as fine-tuning wants it."""

    checkpoint: str
    """A checkpoint folder or a run folder."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """`random` takes the checkpoint's architecture and tokenizer only: the floor that shows what pretraining is worth."""
    image_size: int | None = Field(default=None, ge=1)
    """Pixels a side; null: the checkpoint's. Position embeddings are interpolated to another size."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the image encoder, rising linearly to this share at the last block."""
    recompute: bool = False


@dataclass(frozen=True)
class Start:
    """A model to fine-tune, with what it was trained with."""

    model: SyCoCa
    tokenizer: Tokenizer
    config: PretrainedConfig
    """Describes `model` as it is now: parts and image size as the task asked."""


def start_from(config: StartConfig, *, parts: Set[Part], transform: TransformConfig | None = None) -> Start:
    """The checkpoint's model with exactly these parts; what was loaded, is missing, or is not used is said in the log.

    transform: the task's own; its size becomes the model's, its means and deviations stay the checkpoint's. Raises
    CheckpointError where the checkpoint was trained without one of the parts.
    """
    folder = find_checkpoint(Path(config.checkpoint))
    before = load_config(PretrainedConfig, folder / "model.yaml")
    lacking = sorted(set(parts) - set(before.parts))
    if lacking:
        raise CheckpointError(
            f"{folder} was trained without the part {lacking[0]!r} and cannot {PURPOSE.get(lacking[0], 'do this')}; "
            f"start from a checkpoint whose objectives need it (its parts: {', '.join(before.parts)})"
        )
    after = describe(before, config, parts, transform)
    tokenizer = build_tokenizer(folder / "tokenizer")
    model = SyCoCa(after.model, vocab_size=tokenizer.vocab_size, max_tokens=after.max_tokens, parts=set(parts))
    if config.weights == "random":
        logger.warning("start: random weights, the architecture of %s", folder)
    else:
        load_common(model, load_file(folder / "model.safetensors"), source=str(folder))
    return Start(model, tokenizer, after)


def check_tokenizer(data: LoaderConfig) -> None:
    """Raises ConfigError where the data names a tokenizer: the checkpoint's own reads, and another would be passed over."""
    if data.tokenizer != TokenizerConfig():
        raise ConfigError(f"data.tokenizer: {data.tokenizer.name!r}; remove it, the checkpoint's own tokenizer is used")


def describe(
    before: PretrainedConfig, config: StartConfig, parts: Set[Part], transform: TransformConfig | None
) -> PretrainedConfig:
    """What the model will be: the checkpoint's description with the task's parts, size and stochastic depth."""
    size = config.image_size or before.model.vision.image_size
    vision = before.model.vision.model_copy(update={"pretrained": False, "image_size": size, "drop_path": config.drop_path})
    model = before.model.model_copy(update={"vision": vision, "recompute": config.recompute, "locked": []})
    chosen = transform or before.transform
    seen = chosen.model_copy(update={"size": size, "mean": before.transform.mean, "std": before.transform.std})
    return before.model_copy(update={"model": model, "parts": sorted(parts), "transform": seen})


def load_common(model: SyCoCa, weights: dict[str, Tensor], *, source: str) -> None:
    """Load every weight of `model` from a checkpoint's, with position embeddings interpolated; unused ones are listed.

    Raises CheckpointError for a weight that is missing or of another shape: nothing starts from random numbers unsaid.
    """
    own = model.state_dict()
    found = {key.removeprefix(MODEL_PREFIX): value for key, value in weights.items() if key.startswith(MODEL_PREFIX)}
    missing = sorted(own.keys() - found.keys())
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} weights of this model: {', '.join(missing[:5])}")
    place = "vision.vit.pos_embed"
    if place in own and own[place].shape != found[place].shape:
        found[place] = interpolate_positions(found[place], model)
        logger.info("start: position embeddings interpolated to %s", tuple(own[place].shape))
    wrong = [key for key, value in own.items() if found[key].shape != value.shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(f"{source}: {key} has shape {tuple(found[key].shape)}, expected {tuple(own[key].shape)}")
    model.load_state_dict({key: found[key] for key in own})
    unused = sorted({".".join(key.split(".")[:2]) for key in found.keys() - own.keys()})
    logger.info("start: all %d weights from %s; not used: %s", len(own), source, ", ".join(unused) or "nothing")


def interpolate_positions(position: Tensor, model: SyCoCa) -> Tensor:
    """(1, N, D) for the model's grid, bicubic; prefix tokens keep theirs (ViT, section 3.2)."""
    vit = model.vision.vit
    num_prefix = position.shape[1] - round((position.shape[1] - model.vision.num_prefix_tokens) ** 0.5) ** 2
    return resample_abs_pos_embed(position, list(vit.patch_embed.grid_size), num_prefix_tokens=num_prefix)
