"""The loop: one for pretraining and every fine-tuning."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from sycoca.train.engine import clip_gradients
from sycoca.train.optim import OptimConfig, set_lr
from sycoca.types import Batch, Metrics


@dataclass
class TrainState:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    num_pairs: int = 0
    best: float | None = None
    positions: Any = None
    """The data path's own account of what was read (data/pipeline.py)."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step leaves behind for the hooks."""

    step: int
    batch: Batch
    metrics: Metrics
    lr: float
    wait_seconds: float
    is_last: bool


class Hook(Protocol):
    """Called after every step, on every rank."""

    def __call__(self, report: StepReport) -> None: ...


def train(
    task: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    plan: OptimConfig,
    state: TrainState,
    hooks: list[Hook],
) -> None:
    """Train until `plan.num_steps`, starting from `state.step`; `state` is kept up to date."""
    task.train()
    stream = iter(batches)
    while state.step < plan.num_steps:
        started = time.perf_counter()
        batch = to_device(next(stream), accelerator.device)
        ready = time.perf_counter()
        lr = plan.lr_at(state.step)
        set_lr(optimizer, lr)  # before backward: DeepSpeed steps inside it
        loss, metrics = task(batch)
        accelerator.backward(loss)
        norm = clip_gradients(accelerator, task, plan.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        if norm is not None:
            metrics["grad_norm"] = norm
        report = StepReport(state.step, batch, metrics, lr, ready - started, is_last=state.step >= plan.num_steps)
        for hook in hooks:
            hook(report)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return moved  # pyright: ignore[reportReturnType]
