"""A run whose task is a small layer, through the real engine, loop, hooks and checkpoints: milliseconds a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sycoca.config import parse_config
from sycoca.train.run import Job, TrainConfig, run_job, start_engine

NUM_PAIRS, WIDTH = 3, 5


class ToyTask(nn.Module):
    """With dropout, so that the random state matters; a frozen part, buffers."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.frozen = nn.Linear(width, 1).requires_grad_(False)
        self.register_buffer("scale", torch.full((2,), 0.5))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.step += 1
        hidden = torch.dropout(self.first(batch["image"]), 0.3, self.training)
        loss = (self.frozen(self.second(hidden)) * self.scale.sum()).square().mean()
        return loss, {"loss": loss.detach()}


def batches(position: Any, width: int = WIDTH) -> Iterator[dict[str, Any]]:
    """Batch number n is a function of n, which is the position."""
    offset = position["workers"]["0"]["offset"] if position else 0
    while True:
        offset += 1
        stands = {"epoch": 0, "group": 0, "offset": offset}
        generator = torch.Generator().manual_seed(offset)
        yield {
            "image": torch.randn(NUM_PAIRS, width, generator=generator),
            "token": torch.zeros(NUM_PAIRS, 2),
            "length": torch.full((NUM_PAIRS,), 2),
            "key": [f"{offset}/{row}" for row in range(NUM_PAIRS)],
            "position": {
                "worker": 0, "num_workers": 1, "order": "toy", "num_dropped": {}, "worst": None, "topology": None, **stands,
            },
        }


def settings(folder: Path, *, num_steps: int = 6, average_decay: float = 0.0, **run: Any) -> TrainConfig:
    """Of a run; `run` replaces its fields."""
    fixed = {"folder": str(folder), "precision": "fp32", "log_every": 1, "checkpoint_every": 2, "tensorboard": False}
    optim = {"lr": 0.1, "num_steps": num_steps, "warmup_steps": 1, "average_decay": average_decay}
    return parse_config(TrainConfig, {"run": {**fixed, **run}, "optim": optim}, source="tests")


def toy_job(width: int = WIDTH, **changes: Any) -> Job:
    """What is trained; `changes` replace the job's fields."""
    fields = {"load_batches": lambda position: batches(position, width), "describe": describe, **changes}
    return Job(ToyTask(width), **fields)


def describe(folder: Path) -> None:
    (folder / "model.yaml").write_text("toy: true", encoding="utf-8")


def run_toy(config: TrainConfig, *, width: int = WIDTH, **changes: Any) -> dict[str, float | str | int]:
    """The whole run, from the engine to the last checkpoint."""
    accelerator = start_engine(config, batch_size=NUM_PAIRS)
    return run_job(config, toy_job(width, **changes), accelerator)
