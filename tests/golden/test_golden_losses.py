"""A change that should not change numbers must leave these losses as they are.

Each row of the ablation trains a tiny model for a few steps from fixed weights. Where a change of numbers is meant,
write the new ones with `python -m pytest tests/golden --golden-write` and say in the commit why they differ.
"""

import json
from pathlib import Path

import pytest
import torch
from builders import ABLATION_ROWS, build_batch, build_task

from sycoca.train.optim import OptimConfig, build_optimizer, set_lr

GOLDEN = Path(__file__).with_name("losses.json")
NUM_STEPS = 4
TOLERANCE = 2e-4
"""Relative; what other matrix kernels on another CPU may differ by after these steps."""


def train(row: str) -> list[dict[str, float]]:
    """Every metric of each step; random masks from a fixed seed."""
    task = build_task(ABLATION_ROWS[row])
    config = OptimConfig(lr=1e-2, num_steps=NUM_STEPS, warmup_steps=2)
    optimizer = build_optimizer(task, config)
    torch.manual_seed(5)
    steps = []
    for step in range(NUM_STEPS):
        set_lr(optimizer, config.lr_at(step))
        loss, metrics = task(build_batch(seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append({name: round(value.item(), 6) for name, value in metrics.items()})
    return steps


@pytest.mark.parametrize("row", ABLATION_ROWS)
def test_losses_are_as_they_were(row: str, request: pytest.FixtureRequest):
    found = train(row)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if request.config.getoption("--golden-write"):
        GOLDEN.write_text(json.dumps({**golden, row: found}, indent=1) + "\n", encoding="utf-8")
        return
    for step, (values, expected) in enumerate(zip(found, golden[row], strict=True)):
        assert values == pytest.approx(expected, rel=TOLERANCE), f"step {step}"
