"""What every rank of test_diagnosis_over_ranks.py runs: bad batches, gradient norms, a rank that sleeps in its data loader."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from builders import ABLATION_ROWS, build_batch, build_task, take_rows
from torch import Tensor, nn

from sycoca.distributed import gather_objects, rank, world_size
from sycoca.train.diagnosis.grad_norms import check_grad_norms, objective_grad_norms
from sycoca.train.diagnosis.non_finite import NonFiniteHook
from sycoca.train.diagnosis.watchdog import Watchdog
from sycoca.train.engine import build_accelerator, name_engine, prepare
from sycoca.train.loop import Hook, StepReport, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.types import Batch, ConfigError, Metrics, TrainingError
from tests.forks import zero_stages

PLAN = OptimConfig(lr=0.02, num_steps=4, warmup_steps=2, clip_norm=0.5, eps=1e-3, on_non_finite="skip")
NUM_ALL = 4
BAD_LOSS, BAD_GRADIENT = 2, 3
"""The steps whose batch makes the loss NaN (on the last rank alone), or the gradient of a finite loss."""
LONGEST_SLEEP = 240.0


class Spiky(nn.Module):
    """The task, with an infinite slope where a batch's first key says so; the loss stays what it is."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = self.inner(batch)
        return (loss + (loss * 0).sqrt() if batch["key"][0] == "spike" else loss), metrics


def batches(*, are_bad: bool = True) -> Iterator[Batch]:
    """This rank's rows of another batch at each step, two of the steps bad."""
    size = NUM_ALL // world_size()
    for step in range(1, PLAN.num_steps + 1):
        whole = build_batch(NUM_ALL, seed=step)
        whole["key"] = [f"step{step}_{key}" for key in whole["key"]]
        if are_bad and step == BAD_LOSS:
            whole["image"][-1, 0, 0, 0] = torch.nan
        if are_bad and step == BAD_GRADIENT:
            whole["key"][0] = "spike"
        yield take_rows(whole, list(range(rank() * size, (rank() + 1) * size)))


def prepare_task(num_ranks: int) -> tuple[Any, nn.Module, Any, nn.Module]:
    """Accelerator, prepared task and optimiser, and the bare task."""
    accelerator = build_accelerator(PLAN.clip_norm, batch_size=NUM_ALL // num_ranks)
    plain = build_task(ABLATION_ROWS["coca"])
    task = Spiky(plain)
    return accelerator, *prepare(accelerator, task, build_optimizer(task, PLAN)), plain


def skip_bad_batches(folder: Path, num_ranks: int) -> dict[str, Any]:
    """Weights after the steps, what each report said, and every objective's gradient norm at the end."""
    accelerator, task, optimizer, plain = prepare_task(num_ranks)
    flags: list[tuple[bool, bool]] = []

    def note(report: StepReport) -> None:
        flags.append((report.is_finite, report.is_taken))

    hooks: list[Hook] = [NonFiniteHook(PLAN, folder / "bad_batches"), note]
    train(task, batches(), optimizer, accelerator=accelerator, plan=PLAN, state=TrainState(), hooks=hooks)
    found = {"flags": flags, "engine": name_engine(accelerator), "norms": {}, "refused": ""}
    try:
        check_grad_norms(1, plain, accelerator)
        batch = next(batches(are_bad=False))
        found["norms"] = objective_grad_norms(plain, batch)  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        found["refused"] = str(error)
    found["weights"] = accelerator.get_state_dict(task)  # a gather under ZeRO-3: all ranks
    return found


def stop_at_a_bad_batch(folder: Path) -> list[str]:
    """Every rank's error."""
    accelerator, task, optimizer, _ = prepare_task(world_size())
    plan = PLAN.model_copy(update={"on_non_finite": "stop"})
    hooks: list[Hook] = [NonFiniteHook(plan, folder / "stopped")]
    try:
        train(task, batches(), optimizer, accelerator=accelerator, plan=plan, state=TrainState(), hooks=hooks)
    except TrainingError as error:
        return gather_objects(str(error))
    return []


def sleep_in_the_loader(folder: Path) -> None:
    """The last rank stands still before its second batch until rank 0's watchdog has named it; standard error goes to files."""
    accelerator, task, optimizer, _ = prepare_task(world_size())
    log = folder / f"stderr_{rank()}.txt"
    sys.stderr = log.open("w", encoding="utf-8", buffering=1)

    def sleepy() -> Iterator[Batch]:
        for number, batch in enumerate(batches(are_bad=False)):
            deadline = time.monotonic() + LONGEST_SLEEP
            while number == 1 and rank() == world_size() - 1 and time.monotonic() < deadline:
                time.sleep(0.1)
                said = [(folder / f"stderr_{other}.txt").read_text(encoding="utf-8") for other in range(world_size())]
                if "furthest behind: rank 1" in said[0] and "in step 2, waiting for data" in said[-1]:
                    break
            yield batch

    state = TrainState()
    with Watchdog(
        state.clock, folder / "state", rank=rank(), world_size=world_size(), stall_seconds=1.0, abort_seconds=0
    ):  # fmt: skip
        train(task, sleepy(), optimizer, accelerator=accelerator, plan=PLAN, state=state, hooks=[])


def find_under_ddp(folder: Path) -> dict[str, Any]:
    """What a rank finds, and files in the folder."""
    found = skip_bad_batches(folder, 2)
    found["errors"] = stop_at_a_bad_batch(folder)
    sleep_in_the_loader(folder)
    return found


def find_under_zero(folder: Path) -> dict[str, Any]:
    """What a rank finds under each stage."""
    return {f"ZeRO-{stage}": skip_bad_batches(folder / f"stage_{stage}", 2) for stage in zero_stages()}
