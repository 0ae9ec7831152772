"""What every rank of test_zero.py runs: a few steps of `train` under ZeRO 1, 2 and 3 in turn."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from builders import ABLATION_ROWS, build_batch, build_task, take_rows

from sycoca.distributed import mean_over_ranks, rank, world_size
from sycoca.train.engine import build_accelerator, describe_engine, prepare
from sycoca.train.loop import StepReport, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.types import Batch
from tests.forks import zero_stages

PLAN = OptimConfig(lr=0.02, num_steps=3, warmup_steps=2, weight_decay=0.3, clip_norm=0.5, eps=1e-3)
"""The norm is clipped. A large eps: parameters whose gradient is rounding alone would else move by whole steps of Adam."""
NUM_ALL = 4


def batches() -> Iterator[Batch]:
    """This rank's rows of another batch at each step."""
    size = NUM_ALL // world_size()
    for step in range(PLAN.num_steps):
        yield take_rows(build_batch(NUM_ALL, seed=step), list(range(rank() * size, (rank() + 1) * size)))


def run_steps(*, num_chunks: int) -> dict[str, Any]:
    """Weights, losses and gradient norms of a full SyCoCa after `PLAN`'s steps, and the engine's name."""
    size = NUM_ALL // int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = build_accelerator(PLAN.clip_norm, batch_size=size)
    plain = build_task(ABLATION_ROWS["sycoca"], num_chunks=num_chunks)
    task, optimizer = prepare(accelerator, plain, build_optimizer(plain, PLAN))
    losses, norms = [], []

    def note(report: StepReport) -> None:
        losses.append(mean_over_ranks(report.metrics["loss"]))
        norms.append(report.metrics["grad_norm"])

    train(task, batches(), optimizer, accelerator=accelerator, plan=PLAN, state=TrainState(), hooks=[note])
    weights = accelerator.get_state_dict(task)  # a gather under ZeRO-3: all ranks
    engine = describe_engine(accelerator, "fp32", batch_size=size)
    return {"weights": weights, "losses": torch.stack(losses), "norms": torch.stack(norms), "engine": engine}


def find_by_stage() -> dict[int, dict[str, Any]]:
    """What a rank finds under each stage."""
    return {stage: run_steps(num_chunks=2) for stage in zero_stages()}
