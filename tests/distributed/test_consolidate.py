"""DeepSpeed's shards give back every weight: tied and frozen ones, and buffers (DeepSpeed #1896, #3033, #6771)."""

from pathlib import Path

import pytest
import torch
from launches import launch_ranks
from run_worker import Launch, save_toys_rank
from safetensors.torch import load_file

from sycoca.train.checkpoint.consolidate import consolidate, require_equal
from sycoca.types import CheckpointError

pytestmark = pytest.mark.slow
KEYS = {"first.weight", "first.bias", "second.weight", "second.bias", "frozen.weight", "frozen.bias", "scale", "step"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two processes at every stage."""
    folder = tmp_path_factory.mktemp("toys")
    statuses, failures = launch_ranks(Launch(folder, folder), save_toys_rank)
    assert statuses == [0, 0], failures
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_are_made_into_the_whole_weights(stage: int, folder: Path, tmp_path: Path):
    checkpoint, out = folder / f"zero_{stage}/step_00000002", tmp_path / "out.safetensors"
    found = consolidate(checkpoint, out, choice="newest")
    assert found["engine"] == f"ZeRO-{stage}" and found["are_shards_equal"]
    weights = load_file(out)
    assert weights.keys() == KEYS
    assert torch.equal(weights["first.weight"], weights["second.weight"])
    assert weights["step"].item() == 2 and weights["step"].dtype == torch.int64
    whole = checkpoint / "model.safetensors"
    whole.rename(checkpoint / "kept")
    try:
        consolidate(checkpoint, tmp_path / "rebuilt.safetensors", choice="newest", from_shards=True)
        require_equal(load_file(tmp_path / "rebuilt.safetensors"), weights, names=("rebuilt", "whole"))
    finally:
        (checkpoint / "kept").rename(whole)


def test_whole_weights_that_are_not_those_of_the_shards_are_refused(folder: Path):
    shards = load_file(folder / "zero_2/step_00000002/model.safetensors")
    other = {**shards, "frozen.bias": shards["frozen.bias"] + 1}
    del other["scale"]
    with pytest.raises(CheckpointError, match=r"a and b differ: scale is missing in a; frozen\.bias differs"):
        require_equal(other, shards, names=("a", "b"))
