"""DeepSpeed's ZeRO 1, 2 and 3 with two processes take the same steps as one plain process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ddp import free_port
from zero_worker import PLAN, run_steps

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """One plain process, in one piece; the workers work in two chunks a rank."""
    return run_steps(num_chunks=1)


@pytest.fixture(scope="module")
def found_at(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What two processes found at each stage, from one launch."""
    folder = tmp_path_factory.mktemp("zero")
    command = [
        "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "1", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
        str(HERE / "zero_worker.py"), str(folder),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {stage: torch.load(folder / f"stage_{stage}.pt", weights_only=False) for stage in (1, 2, 3)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_does(stage: int, found_at: dict, expected: dict):
    """DeepSpeed's gradients are hard to read, so what is compared are losses, gradient norms and weights after three steps."""
    found = found_at[stage]
    assert f"ZeRO-{stage}, 2 processes on cpu" in found["engine"]
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    assert (expected["norms"] > PLAN.clip_norm).all(), "clipping is at work"
    torch.testing.assert_close(found["norms"].float(), expected["norms"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["weights"], dict(expected["weights"]), rtol=1e-4, atol=1e-5)
