"""The soak itself, in short: python -m tests.distributed.soak is the long one."""

from pathlib import Path

import pytest

from tests.distributed.soak import soak


@pytest.mark.soak
@pytest.mark.parametrize("launch_file", ["ddp", "zero2"])
def test_a_run_that_is_harmed_ends_as_one_that_is_left_alone(launch_file: str, tmp_path: Path):
    launch = f"launch/accelerate/{launch_file}.yaml"
    found = soak(tmp_path, num_steps=120, num_faults=6, seed=1, launch_file=launch, furthest=15)  # six gaps fit in the steps
    assert found["are_weights_equal"]
    assert found["losses_that_differ"] == 0
    assert sum(found["faults"].values()) == 6
