"""DeepSpeed's ZeRO 1, 2 and 3 with two processes take the same steps as one plain process with the whole batch."""

from typing import Any

import pytest
import torch
from zero_worker import PLAN, find_by_stage, run_steps

from tests.forks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """One plain process, in one piece; the workers work in two chunks a rank."""
    return run_steps(num_chunks=1)


@pytest.fixture(scope="module")
def found_at() -> dict[int, Any]:
    """What two processes found at each stage."""
    return run_ranks(find_by_stage, 2)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_does(stage: int, found_at: dict, expected: dict):
    """DeepSpeed's gradients are hard to read, so what is compared are losses, gradient norms and weights after three steps."""
    found = found_at[stage]
    assert f"ZeRO-{stage}, 2 processes on cpu" in found["engine"]
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    assert (expected["norms"] > PLAN.clip_norm).all(), "clipping is at work"
    torch.testing.assert_close(found["norms"].float(), expected["norms"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["weights"], dict(expected["weights"]), rtol=1e-4, atol=1e-5)
