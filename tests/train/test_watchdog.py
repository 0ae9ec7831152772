"""The watchdog on one process: what it says, what it writes, how it ends a run."""

import ctypes
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

import sycoca.train.diagnosis.watchdog as watchdog
from sycoca.config import parse_config
from sycoca.train.diagnosis.phases import BACKWARD, DONE, EVALUATION, FORWARD, WAITING, PhaseClock
from sycoca.train.diagnosis.watchdog import STALLED_STATUS, Watchdog, describe, furthest_behind, read_states
from sycoca.train.run import RunConfig
from sycoca.types import ConfigError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK_SECONDS", 0.05)


def standing_for(seconds: float) -> PhaseClock:
    """A clock whose phase began so long ago: tests wait for no real time."""
    clock = PhaseClock()
    clock.step, clock.keys = 7, [f"photo_{n}" for n in range(10)]
    clock.enter(BACKWARD)
    clock.since -= seconds
    return clock


def watch(folder: Path, clock: PhaseClock, *, stall_seconds: float = 50.0, abort_seconds: float = 0.0) -> Watchdog:
    return Watchdog(clock, folder, rank=0, world_size=1, stall_seconds=stall_seconds, abort_seconds=abort_seconds)


def state_of(step: int, phase: str, *, age: float = 0.0) -> dict:
    now = time.time()
    return {"step": step, "phase": phase, "since": now - 60, "written": now - age, "keys": ["a", "b"], "seconds": {phase: 60.0},
            "host": "node", "pid": 7}  # fmt: skip


def test_standing_still_is_reported_once_with_phase_keys_and_the_line_that_hangs(tmp_path: Path, capsys):
    said = ""
    with watch(tmp_path, standing_for(60)):
        for _ in range(60):  # on a busy machine the watchdog's thread may be late
            time.sleep(0.5)
            if said:
                break
            said += capsys.readouterr().err
    said += capsys.readouterr().err
    assert said.count("has stood still for") == 1 and "in step 7, backward" in said
    assert "photo_0" in said and "photo_7 and 2 more" in said and "photo_8" not in said
    assert "time.sleep(0.5)" in said and "all ranks stand in the same place" in said


def test_steps_that_go_on_are_no_standing_still(tmp_path: Path, capsys):
    clock = standing_for(60)
    clock.enter(FORWARD)
    with watch(tmp_path, clock):
        time.sleep(0.5)
    assert "stood still" not in capsys.readouterr().err


def test_a_rank_says_in_its_file_where_its_time_went(tmp_path: Path):
    clock = PhaseClock()
    with watch(tmp_path, clock):
        clock.enter(WAITING)
        with clock.within(EVALUATION):
            time.sleep(0.02)
    [state] = read_states(tmp_path, 1)
    assert state is not None and state["phase"] == DONE
    assert state["seconds"]["evaluation"] >= 0.02 and {"starting", WAITING} <= state["seconds"].keys()


def test_a_folder_that_cannot_be_written_leaves_the_error_of_training_as_it_is(tmp_path: Path):
    def fail() -> None:
        with watch(tmp_path / "state", PhaseClock()):
            shutil.rmtree(tmp_path / "state")
            raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"):
        fail()


def test_a_rank_that_failed_is_what_the_others_wait_for(tmp_path: Path):
    with pytest.raises(KeyError), watch(tmp_path, PhaseClock()):
        raise KeyError("gone")
    [state] = read_states(tmp_path, 1)
    assert furthest_behind([state_of(9, FORWARD), state]) == [1]
    assert "ended by KeyError" in describe([state_of(9, FORWARD), state])[1]


@pytest.mark.parametrize(
    ("states", "behind"),
    [
        ([(5, BACKWARD, 0), (5, WAITING, 0), (5, BACKWARD, 0)], [1]),
        ([(5, FORWARD, 0), (5, FORWARD, 0), (4, BACKWARD, 0)], [2]),
        ([(5, FORWARD, 0), (5, FORWARD, 0)], []),
        ([(5, WAITING, 0), (5, BACKWARD, 300)], [1]),
        ([(5, FORWARD, 0), None], [1]),
        ([(5, DONE, 300), (5, EVALUATION, 0), (5, DONE, 300)], [1]),
    ],
    ids=["phase", "step", "alike", "silent", "never_wrote", "done"],
)
def test_the_rank_that_the_others_wait_for_is_the_silent_one_or_the_earliest(states: list, behind: list[int]):
    """Each rank's step, phase, and how many seconds ago it wrote."""
    written = [None if state is None else state_of(state[0], state[1], age=state[2]) for state in states]
    assert furthest_behind(written) == behind


def test_a_silent_rank_is_named_with_its_process(tmp_path: Path):
    assert "SILENT for 300 s: process 7 on node is gone or stopped" in describe([state_of(5, FORWARD, age=300)])[0]


def stand_still(folder: Path) -> None:
    """In a process of its own: standard error to a file, then nothing more happens."""
    log = os.open(folder / "stderr.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    with watch(folder, standing_for(60), abort_seconds=55):
        time.sleep(60)


def hold_the_lock(folder: Path) -> None:
    """A C function that keeps Python's lock: no other thread of Python runs meanwhile."""
    log = os.open(folder / "stderr.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    with watch(folder, PhaseClock(), stall_seconds=1.0):
        time.sleep(0.3)
        ctypes.PyDLL(None).sleep(5)


def test_a_run_that_stands_still_for_too_long_is_ended_with_an_error(tmp_path: Path):
    process = multiprocessing.get_context("fork").Process(target=stand_still, args=(tmp_path,))
    process.start()
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == STALLED_STATUS
    said = (tmp_path / "stderr.txt").read_text(encoding="utf-8")
    assert "longer than run.stall_abort; ending the process" in said and "time.sleep(60)" in said
    assert json.loads((tmp_path / "rank_0.json").read_text(encoding="utf-8"))["phase"] == BACKWARD


@pytest.mark.slow
def test_the_stack_is_printed_even_where_a_c_extension_keeps_pythons_lock(tmp_path: Path):
    process = multiprocessing.get_context("fork").Process(target=hold_the_lock, args=(tmp_path,))
    process.start()
    process.join(timeout=60)
    process.kill()
    _, timeout, stacks = (tmp_path / "stderr.txt").read_text(encoding="utf-8", errors="replace").partition("Timeout (")
    assert timeout and "in hold_the_lock" in stacks


def test_ending_a_run_before_it_is_reported_is_refused():
    with pytest.raises(ConfigError, match="stall_abort: the watchdog reports first"):
        parse_config(RunConfig, {"folder": "x", "stall_minutes": 5, "stall_abort": 2}, source="test")
