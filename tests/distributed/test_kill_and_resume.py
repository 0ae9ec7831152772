"""Killed, stopped or unable to write in the middle of real processes: what is left continues with the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launches import launch_ranks, losses_by_step, train_once
from run_worker import Launch

from sycoca.data.scenes import write_scenes
from sycoca.train.checkpoint.checksums import list_damage
from sycoca.train.checkpoint.stop import STOPPED_STATUS

KILLED = -9
ENGINES = {"plain": (1, 0), "DDP": (2, 0), "ZeRO-2 alone": (1, 2), "ZeRO-2": (2, 2)}
"""Processes and ZeRO stage."""
SAMPLE = {("DDP", 3), ("ZeRO-2", 1)}
"""Of the matrix, what runs in every test; the rest is soaked."""
CELLS = [
    pytest.param(engine, num, id=f"{engine}-{num}", marks=pytest.mark.slow if (engine, num) in SAMPLE else pytest.mark.soak)
    for engine in ENGINES
    for num in (0, 1, 3)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATA folder with fewer shards than there are loader workers on two ranks."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "scenes32", num_train=60, num_val=2, size=32, samples_per_shard=20)
    return folder


def launch_of(engine: str, num_workers: int, data: Path, folder: Path) -> Launch:
    """Nine steps, saved after every second, with dropout and random masks."""
    world, stage = ENGINES[engine]
    overrides = (
        f"data.num_workers={num_workers}", "optim.num_steps=9", "run.checkpoint_every=2", "run.sample_every=0",
        "evaluate.shards=[]", "objectives.tg_mim.mask=random", "model.text.dropout=0.1",
    )  # fmt: skip
    return Launch(data, folder, world=world, zero_stage=stage, overrides=overrides)


@pytest.mark.parametrize(("engine", "num_workers"), CELLS)
def test_a_killed_run_goes_on_with_the_same_bits(engine: str, num_workers: int, data: Path, tmp_path: Path):
    """Killed at step 7, while the checkpoint of step 6 may be half written: that of step 4 is there in any case."""
    whole = train_once(launch_of(engine, num_workers, data, tmp_path / "whole"))
    launch = launch_of(engine, num_workers, data, tmp_path / "killed")
    statuses, _ = launch_ranks(replace(launch, killed_at=7))
    assert statuses == [KILLED] * launch.world
    left = [path for path in (tmp_path / "killed/checkpoints").glob("step_*") if not list_damage(path)]
    assert {"step_00000004"} <= {path.name for path in left} <= {"step_00000002", "step_00000004", "step_00000006"}
    assert train_once(launch) == whole
    lines = (tmp_path / "killed/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] in ([*range(1, 8), *range(5, 10)], [*range(1, 8), *range(7, 10)])


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(data: Path, tmp_path: Path):
    launch = replace(launch_of("DDP", 0, data, tmp_path / "stopped"), signal_at=3)
    statuses, failures = launch_ranks(launch)
    assert statuses == [STOPPED_STATUS] * 2, failures
    assert sorted(losses_by_step(launch.folder)) == [1, 2, 3, 4]
    assert (launch.folder / "checkpoints/last").resolve().name == "step_00000004"
    assert list_damage(launch.folder / "checkpoints/last") == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", pytest.param("ZeRO-2", marks=pytest.mark.soak)])
def test_what_one_rank_cannot_write_is_an_error_on_all_and_leaves_the_checkpoint_before(
    engine: str, data: Path, tmp_path: Path
):
    """From step 6, while the checkpoint of step 4 may be half written: that of step 2 is there in any case."""
    launch = replace(launch_of(engine, 0, data, tmp_path / "full"), unwritable_at=6)
    statuses, failures = launch_ranks(launch)
    assert statuses == [1, 1]
    assert len(set(failures)) == 1 and len(failures) == 2
    assert "could not be written: File too large" in failures[0]
    left = sorted(path.name for path in (launch.folder / "checkpoints").iterdir())
    assert left in (["last", "step_00000002"], ["last", "step_00000002", "step_00000004"])
    assert f"{left[-1]} is the last good checkpoint" in failures[0]
