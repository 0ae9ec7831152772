"""The loop: one for pretraining and every fine-tuning."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from sycoca.distributed import any_rank
from sycoca.train.diagnosis.phases import BACKWARD, FORWARD, LOGGING, STEP, WAITING, PhaseClock
from sycoca.train.engine import clip_gradients
from sycoca.train.optim import OptimConfig, set_lr
from sycoca.types import Batch, Metrics


@dataclass
class TrainState:
    """Where training stands; saved with every checkpoint, the clock apart."""

    step: int = 0
    num_pairs: int = 0
    best: float | None = None
    positions: Any = None
    """The data path's own account of what was read (data/pipeline.py)."""
    clock: PhaseClock = field(default_factory=PhaseClock)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step leaves behind for the hooks."""

    step: int
    batch: Batch
    metrics: Metrics
    lr: float
    wait_seconds: float
    is_last: bool
    is_finite: bool = True
    """Whether loss and gradient were finite on every rank."""
    is_taken: bool = True
    """Whether the weights moved."""


class Hook(Protocol):
    """Called after every step, on every rank."""

    def __call__(self, report: StepReport, /) -> None: ...


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
    clock, stream = state.clock, iter(batches)
    while state.step < plan.num_steps:
        clock.step = state.step + 1
        clock.enter(WAITING)
        started = time.perf_counter()
        batch = to_device(next(stream), accelerator.device)
        ready = time.perf_counter()
        clock.keys = batch["key"]
        lr = plan.lr_at(state.step)
        set_lr(optimizer, lr)  # before backward: DeepSpeed steps inside it
        taken = take_step(task, batch, optimizer, accelerator=accelerator, plan=plan, clock=clock)
        state.step += 1
        clock.enter(LOGGING)
        is_last = state.step >= plan.num_steps
        report = StepReport(state.step, batch, taken.metrics, lr, ready - started, is_last, taken.is_finite, taken.is_taken)
        for hook in hooks:
            hook(report)


@dataclass(frozen=True, slots=True)
class TakenStep:
    """What became of a batch; the same on every rank but for the metrics."""

    metrics: Metrics
    is_finite: bool
    is_taken: bool


def take_step(
    task: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    plan: OptimConfig,
    clock: PhaseClock,
) -> TakenStep:
    """Forward, backward, step. A loss or gradient that is not finite on any rank leaves the weights of all as they were."""
    clock.enter(FORWARD)
    loss, metrics = task(batch)
    steps_in_backward = accelerator.state.deepspeed_plugin is not None
    if steps_in_backward and is_bad(loss):
        return TakenStep(metrics, is_finite=False, is_taken=False)
    clock.enter(BACKWARD)
    accelerator.backward(loss)
    norm = clip_gradients(accelerator, task, plan.clip_norm)
    clock.enter(STEP)
    if norm is not None:
        metrics["grad_norm"] = norm.to(loss.device)
    is_finite = not is_bad(loss.detach() + metrics.get("grad_norm", 0.0))
    if is_finite or steps_in_backward:
        optimizer.step()
    optimizer.zero_grad()
    return TakenStep(metrics, is_finite, is_taken=not is_skipped(optimizer) if steps_in_backward else is_finite)


def is_bad(value: torch.Tensor) -> bool:
    """Whether the number is NaN or infinite on any rank. Every rank must call it."""
    return any_rank(not bool(value.isfinite().all()), value.device)


def is_skipped(optimizer: Any) -> bool:
    """Whether DeepSpeed left its step out: from 0.19 on it does so for any gradient that is not finite."""
    return bool(optimizer.step_was_skipped)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return moved  # pyright: ignore[reportReturnType]
