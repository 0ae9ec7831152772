"""Checkpoints are written beside training, count only when they are whole, and survive what can go wrong on the way."""

import json
import logging
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_run import batches, describe, run_toy, settings

from sycoca.train.checkpoint.checksums import list_damage
from sycoca.train.checkpoint.resume import find_resume
from sycoca.train.checkpoint.saving import sweep
from sycoca.train.checkpoint.stop import STOPPED_STATUS
from sycoca.train.run import Evaluation
from sycoca.types import CheckpointError

WIDE = 128
"""So that a checkpoint has some hundred kilobytes."""


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What a run says: its console does not hand lines on to pytest."""
    monkeypatch.setattr("sycoca.train.run.set_up_console", lambda is_main: None)
    caplog.set_level(logging.INFO, "sycoca")
    return caplog


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights(folder: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / checkpoint / "model.safetensors")


def logged_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def signal_at(number: signal.Signals, offset: int) -> Any:
    """`load_batches` that sends this process a signal while it makes batch number `offset`."""

    def load(position: Any) -> Iterator[Any]:
        for batch in batches(position):
            if batch["position"]["offset"] == offset:
                os.kill(os.getpid(), number)
            yield batch

    return load


@pytest.mark.parametrize("is_background", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_a_step_ends_with_the_fixed_status_and_the_run_goes_on_exactly(
    number: signal.Signals, is_background: bool, tmp_path: Path
):
    plan: dict[str, Any] = {"average_decay": 0.9, "checkpoint_every": 100, "background_save": is_background}
    run_toy(settings(tmp_path / "whole", **plan))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run_toy(settings(tmp_path / "stopped", **plan), load_batches=signal_at(number, 2))
    assert ended.value.code == STOPPED_STATUS == 85
    assert signal.getsignal(number) == before
    assert saved(tmp_path / "stopped") == ["last", "step_00000003"]
    run_toy(settings(tmp_path / "stopped", **plan))
    assert logged_steps(tmp_path / "stopped") == [1, 2, 3, 4, 5, 6]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("minutes", "expected"), [(1e-9, ["step_00000004", "step_00000005"]), (1000, ["step_00000005"])])
def test_checkpoints_by_minutes(minutes: float, expected: list[str], tmp_path: Path):
    run_toy(settings(tmp_path, num_steps=5, checkpoint_every=0, checkpoint_minutes=minutes, num_kept=2))
    assert saved(tmp_path) == ["last", *expected]


def test_training_goes_on_while_a_thread_writes_what_was_at_the_time(tmp_path: Path):
    """The description of the checkpoint of step 2 waits for batch 5, which a save in the foreground would never let come."""
    has_moved_on = Event()

    def load(position: Any) -> Iterator[Any]:
        for batch in batches(position):
            if batch["position"]["offset"] == 5:
                has_moved_on.set()
            yield batch

    def slow(folder: Path) -> None:
        assert has_moved_on.wait(timeout=60)
        describe(folder)

    run_toy(settings(tmp_path / "back", num_steps=7, checkpoint_every=5), load_batches=load, describe=slow)
    run_toy(settings(tmp_path / "front", num_steps=7, checkpoint_every=5, background_save=False))
    for name in ("model.safetensors", "state/optimizer.pt", "state/rank_0.json", "state/random_0.pt"):
        back, front = (tmp_path / run / "checkpoints/step_00000005" / name for run in ("back", "front"))
        assert back.read_bytes() == front.read_bytes(), name


@pytest.mark.parametrize("name", ["model.safetensors", "state/optimizer.pt", "meta.json", "checksums.json", "model.yaml"])
@pytest.mark.parametrize("is_truncated", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    name: str, is_truncated: bool, tmp_path: Path, log: pytest.LogCaptureFixture
):
    run_toy(settings(tmp_path, num_steps=4))
    path = tmp_path / "checkpoints/step_00000004" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content[: len(content) // 2] if is_truncated else content)
    with pytest.raises(CheckpointError, match=r"step_00000004 is damaged: .*run\.resume=auto"):
        find_resume(tmp_path / "checkpoints", str(path.parents[name.count("/")]))
    run_toy(settings(tmp_path, num_steps=4))
    is_ours_to_name = is_truncated or name != "checksums.json"  # a flipped bit there speaks of the file of its line
    assert f"step_00000004 is damaged and left alone: {name if is_ours_to_name else ''}" in log.text
    assert "step_00000002 at step 2" in log.text
    assert saved(tmp_path) == ["last", "step_00000002", "step_00000004"]
    assert list_damage(tmp_path / "checkpoints/last") == []


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_beginning(tmp_path: Path):
    run_toy(settings(tmp_path, num_steps=2))
    (tmp_path / "checkpoints/last/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*run\.resume=none"):
        run_toy(settings(tmp_path, num_steps=4))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs privileges; the same error by RLIMIT_FSIZE is tested below")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_background", [True, False])
def test_a_full_disk_names_the_path_and_leaves_the_last_good_checkpoint(is_background: bool, small_disk: Path):
    config = settings(small_disk, num_steps=40, checkpoint_every=4, background_save=is_background)
    with pytest.raises(CheckpointError, match=r"step_00000008.* could not be written: No space left on device; .*_00000004 is"):
        run_toy(config, width=WIDE)
    assert saved(small_disk) == ["last", "step_00000004"]
    assert list_damage(small_disk / "checkpoints/last") == []
    assert logged_steps(small_disk)[-1] < 40, "the error came at a step, not at the end"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert run_toy(config, width=WIDE)["step"] == 40


def test_a_file_that_cannot_be_written_whole_is_an_error_that_names_it(tmp_path: Path):
    run_toy(settings(tmp_path, num_steps=2), width=WIDE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_00000004.*model\.safetensors could not be written: .*File too large"):
            run_toy(settings(tmp_path, num_steps=4), width=WIDE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path) == ["last", "step_00000002"]
    assert run_toy(settings(tmp_path, num_steps=4), width=WIDE)["step"] == 4


def test_what_a_killed_run_left_half_done_is_cleared_and_nothing_good_is_lost(tmp_path: Path):
    for name in (".step_00000002.partial", ".step_00000003.replaced", ".step_00000004.replaced", "step_00000004"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path):
    scores = iter([3.0, 9.0, 1.0, 2.0, 5.0, 4.0])
    evaluation = Evaluation(lambda: {"score": next(scores)}, every=1, choose_by="score")
    run_toy(settings(tmp_path, num_kept=2), evaluation=evaluation)
    assert saved(tmp_path) == ["best", "last", "step_00000002", "step_00000004", "step_00000006"]
    assert (tmp_path / "checkpoints/best").resolve().name == "step_00000002"
    assert json.loads((tmp_path / "checkpoints/best/meta.json").read_text())["metrics"] == {"score": 9.0}
