"""What one rank of test_engine_gradients.py does: gradients under every engine, with dropout and attentive masks."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from builders import (
    ABLATION_ROWS,
    IC,
    ITC,
    MASKED_IC,
    Objectives,
    build_batch,
    build_task,
    gradients,
    model_config,
    take_rows,
    vision_options,
)
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from sycoca.distributed import gather_objects, mean_over_ranks, rank, whole, world_size
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.engine import build_accelerator, name_engine, prepare
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.train.task import PretrainTask
from sycoca.types import Batch

ENGINES = {"DDP": {}, "ZeRO-1": {"stage": "1"}, "ZeRO-2": {"stage": "2"}, "ZeRO-3": {"stage": "3"}, "FSDP2": {"fsdp": "2"}}
ROWS: dict[str, Objectives] = {
    "sycoca": ABLATION_ROWS["sycoca"],
    "itc": {"itc": ITC},
    "ic": {"ic": IC},
    "masked_ic": {"itc": ITC, "ic": MASKED_IC},
    "tg_mim": {"itc": ITC, "tg_mim": MaskedImageConfig()},
}
NUM_ALL = 16
"""Pairs: four ranks with four chunks each."""
NOISE: dict[str, Any] = {
    "vision": {"drop_path": 0.2, **vision_options(proj_drop_rate=0.2)},
    "text": model_config().text.model_dump() | {"dropout": 0.2},
    "text_decoder": {"num_layers": 2, "dropout": 0.2},
}
Case = tuple[str, str, int]
"""Engine, objectives, chunks."""


def build_noisy_task(row: str, *, num_chunks: int) -> PretrainTask:
    return build_task(ROWS[row], num_chunks=num_chunks, **NOISE)


def rows_of(number: int, world: int) -> Batch:
    """What rank `number` of `world` is given."""
    size = NUM_ALL // world
    return take_rows(build_batch(NUM_ALL), list(range(number * size, (number + 1) * size)))


def seed_dropout(number: int) -> None:
    """Before a rank's forward pass: with its chunks' order that settles the dropout of every pair in the global batch."""
    torch.manual_seed(100 + number)


def find_gradients(cases: list[Case]) -> dict[Case, Any]:
    """What one rank finds."""
    return {case: engine_gradients(*case) for case in cases}


def engine_gradients(engine: str, row: str, num_chunks: int) -> dict[str, Any]:
    """Loss and gradients of the batch under an engine, and by how much they differ between ranks."""
    accelerator = start_engine(engine)
    plain = build_noisy_task(row, num_chunks=num_chunks)
    task, _ = prepare(accelerator, plain, build_optimizer(plain, OptimConfig(lr=0.1, num_steps=1)))
    task.train()
    seed_dropout(rank())
    loss, _ = task(rows_of(rank(), world_size()))
    if engine.startswith("ZeRO"):
        task.backward(loss)  # accelerate's would take the step as well, which consumes the gradients
    else:
        accelerator.backward(loss)
    found = read_gradients(accelerator, task)
    ranks = gather_objects(found)
    difference = max(float((one[name] - found[name]).abs().max()) for one in ranks for name in found)
    if engine.startswith("ZeRO"):
        task.destroy()
    return {"engine": name_engine(accelerator), "loss": mean_over_ranks(loss), "gradients": found, "difference": difference}


def start_engine(engine: str) -> Accelerator:
    """As if launched anew for this engine, which launchers say in the environment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = ENGINES[engine]
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    if "stage" in settings:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": settings["stage"]}
    if "fsdp" in settings:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    return build_accelerator(1.0, batch_size=NUM_ALL // int(os.environ["WORLD_SIZE"]))


def read_gradients(accelerator: Accelerator, task: nn.Module) -> dict[str, Tensor]:
    """Every parameter's whole gradient by name, wherever the engine keeps it."""
    inner: Any = accelerator.unwrap_model(task)
    if accelerator.state.deepspeed_plugin is None:
        return {name: whole(grad) for name, grad in gradients(inner).items()}
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in inner.named_parameters()}
