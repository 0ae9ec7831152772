"""Tiny scenes with captions, and a checkpoint of a tiny model that reads them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import model_config, shake, vision_options
from safetensors.torch import save_file

from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.scenes import write_scenes
from sycoca.data.tokenizer import build_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.log import logger
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.pretrained import MODEL_PREFIX, PretrainedConfig, save_description

SIZE, MAX_TOKENS, NUM_VAL, TEMPERATURE = 32, 24, 5, 0.25
PARTS: tuple[Part, ...] = ("contrast", "text", "text_decoder")
TRANSFORM = {"size": SIZE, "train": "resize", "eval": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training scenes in two shards, and five held out."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=12, num_val=NUM_VAL, size=SIZE, samples_per_shard=6)
    return folder


@pytest.fixture
def quiet_run() -> Iterator[None]:
    """The package's logger as other tests expect it, after a run has set its own console up."""
    kept = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])


def save_start(folder: Path, scenes: Path, *, parts: Sequence[Part] = PARTS) -> Path:
    """A checkpoint as pretraining leaves it: noisy weights, and a temperature where it was trained with contrast."""
    folder.mkdir()
    tokenizer = build_tokenizer(scenes / "tokenizer")
    config = model_config(vision={"image_size": SIZE, **vision_options(patch_size=8)})
    torch.manual_seed(0)
    model = SyCoCa(config, vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=set(parts))
    shake(model)
    weights = {MODEL_PREFIX + name: value for name, value in model.state_dict().items()}
    if "contrast" in parts:
        weights["objectives.itc.log_logit_scale"] = torch.tensor([-math.log(TEMPERATURE)])
    save_file(weights, folder / "model.safetensors")
    description = PretrainedConfig(
        model=config, parts=list(parts), transform=TransformConfig.model_validate(TRANSFORM), relevance=RelevanceConfig(),
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    save_description(folder, tokenizer, description)
    return folder


def experiment(start: Path, scenes: Path, folder: Path, /, **changes: Any) -> dict[str, Any]:
    """Four steps of three pairs, saved and evaluated every two; `changes` go into the blocks of those names."""
    tree: dict[str, Any] = {
        "run": {"folder": str(folder), "precision": "fp32", "log_every": 1, "checkpoint_every": 2, "tensorboard": False},
        "optim": {"lr": 0.01, "num_steps": 4, "warmup_steps": 0},
        "start": {"checkpoint": str(start)},
        "data": train_data(scenes).model_dump(exclude_unset=True),
        "evaluate": {"shards": [f"{scenes}/val-*.tar"], "every": 2, "batch_size": 2},
    }
    for name, change in changes.items():
        tree[name] = {**tree.get(name, {}), **change} if isinstance(change, dict) else change
    return tree


def train_data(scenes: Path) -> DataConfig:
    """Of the training scenes, in this process."""
    tree = {"shards": [f"{scenes}/train-*.tar"], "batch_size": 3, "max_tokens": MAX_TOKENS, "num_workers": 0,
            "shuffle_buffer": 4, "transform": {"train": "resize", "eval": "squash"}}  # fmt: skip
    return DataConfig.model_validate(tree)


def held_out(scenes: Path) -> list[dict[str, Any]]:
    """The held-out scenes as an evaluation reads them, in batches of three and two."""
    tree = {"shards": [f"{scenes}/val-*.tar"], "batch_size": 2, "num_workers": 0, "transform": TRANSFORM}
    return list(build_eval_loader(DataConfig.model_validate(tree), rank=0, world_size=1, batch_size=3))


def forget_after(folder: Path, *, step: int) -> None:
    """Leave the run as if it had been killed before its next checkpoint after `step`."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.glob("step_*"):
        if path.name > f"step_{step:08d}":
            path.rename(path.with_name(f"lost_{path.name}"))
    for name in ("last", "best"):
        (checkpoints / name).unlink(missing_ok=True)
    (checkpoints / "last").symlink_to(f"step_{step:08d}")
