"""A watchdog: when training stands still, it says which rank stands where, since when and on which samples.

Every rank's thread writes `folder/rank_N.json` at most once a second, and reads the others' when its own rank has been in one
phase for too long. It says so on standard error with the stack of the main thread; the first rank that still writes adds the
table of all ranks and names those that the others wait for. Should the thread itself be held up (a C extension that keeps
Python's lock), faulthandler prints the stacks from a thread of its own.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sycoca.train.diagnosis.phases import DONE, ORDER, PhaseClock

STALLED_STATUS = 75
"""Exit status of a run that was ended because it stood still (sysexits.h, "temporary failure: try again")."""
_TICK_SECONDS = 1.0
_HEARTBEAT_SECONDS = 10.0
"""A file is written again after this long even if nothing has changed."""
_SILENT_SECONDS = 4 * _HEARTBEAT_SECONDS
"""A rank whose file is older than this has no process any more, or a stopped one."""
FAILED = "ended by"
"""What the phase of a rank that raised begins with."""
_KEYS_SHOWN = 8
_STANDARD_ERROR = 2


class Watchdog:
    """Watches this rank's clock from a thread while it is entered.

    After a report it keeps silent until the rank has stood for twice as long. `abort_seconds` end the process (0: never).
    """

    def __init__(
        self, clock: PhaseClock, folder: Path, *, rank: int, world_size: int, stall_seconds: float, abort_seconds: float
    ):
        self.clock, self.folder, self.rank, self.world_size = clock, folder, rank, world_size
        self.stall_seconds, self.abort_seconds = stall_seconds, abort_seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._tick = min(_TICK_SECONDS, stall_seconds / 4)
        self._written: tuple[Any, ...] = ()
        self._written_at = -_HEARTBEAT_SECONDS

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_state()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.clock.enter(DONE if kind is None else f"{FAILED} {kind.__name__}")
        self._write_state()

    def _watch(self) -> None:
        next_report = self.stall_seconds
        while not self._is_over.wait(self._tick):
            faulthandler.dump_traceback_later(self.stall_seconds + 2 * _TICK_SECONDS, file=_STANDARD_ERROR)
            self._write_state()
            still = time.monotonic() - self.clock.since
            if still < self.stall_seconds:
                next_report = self.stall_seconds
            elif still >= next_report:
                self._report(still)
                next_report = 2 * still
            if 0 < self.abort_seconds <= still:
                self._abort(still)

    def _write_state(self) -> None:
        """Only what has changed, or a sign of life."""
        clock, now = self.clock, time.monotonic()
        facts = (clock.phase, clock.step, clock.since)
        if facts == self._written and now - self._written_at < _HEARTBEAT_SECONDS:
            return
        self._written, self._written_at = facts, now
        state = {
            "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": clock.step, "phase": clock.phase,
            "since": time.time() - (now - clock.since), "written": time.time(), "keys": list(clock.keys),
            "seconds": {phase: round(seconds, 3) for phase, seconds in clock.so_far().items()},
        }  # fmt: skip
        draft = self.folder / f".rank_{self.rank}.partial"
        with suppress(OSError):  # of a full disk the checkpoint's error tells, with what to do; looking on must not hide it
            draft.write_text(json.dumps(state), encoding="utf-8")
            os.replace(draft, state_file(self.folder, self.rank))

    def _report(self, still: float) -> None:
        self._written = ()
        self._write_state()
        time.sleep(self._tick)  # the others' threads write theirs
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        lines = [f"watchdog: rank {self.rank} has stood still for {still:.1f} s in step {self.clock.step}, {self.clock.phase}"]
        states = read_states(self.folder, self.world_size)
        if self.rank == first_awake(states):
            lines += ["watchdog: all ranks:", *describe(states)]
        lines += [f"watchdog: stack of rank {self.rank}'s main thread, the innermost call last:"]
        lines += [line.rstrip() for line in traceback.format_stack(frame)] if frame is not None else []
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _abort(self, still: float) -> None:
        """The main thread cannot be asked to end: it may wait in a collective for ever."""
        print(
            f"error: rank {self.rank} has stood still for {still:.1f} s, longer than run.stall_abort; ending the process. What "
            f"was found is above and in {self.folder}; launched again, the run goes on from its last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(STALLED_STATUS)


def state_file(folder: Path, rank: int) -> Path:
    """Where a rank says what it is doing."""
    return folder / f"rank_{rank}.json"


def read_states(folder: Path, world_size: int) -> list[dict[str, Any] | None]:
    """What every rank last wrote of itself, in rank order; None for a rank that never wrote."""
    files = [state_file(folder, rank) for rank in range(world_size)]
    return [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None for file in files]


def is_silent(state: dict[str, Any] | None) -> bool:
    """Whether a rank's process has failed, or seems to be gone or stopped: even its watchdog no longer writes."""
    if state is None or state["phase"].startswith(FAILED):
        return True
    return state["phase"] != DONE and time.time() - state["written"] > _SILENT_SECONDS


def first_awake(states: list[dict[str, Any] | None]) -> int | None:
    """The lowest rank whose watchdog still writes: rank 0, as long as it lives."""
    return next((rank for rank, state in enumerate(states) if not is_silent(state)), None)


def furthest_behind(states: list[dict[str, Any] | None]) -> list[int]:
    """The ranks that the others wait for: the silent ones, or the earliest in step and phase; none if all are alike."""
    silent = [rank for rank, state in enumerate(states) if is_silent(state)]
    if silent:
        return silent
    places = [place_in_run(state) for state in states if state is not None]
    behind = [rank for rank, place in enumerate(places) if place == min(places)]
    return behind if len(behind) < len(places) else []


def place_in_run(state: dict[str, Any]) -> tuple[int, int]:
    """Step and place of the phase in it, for comparing ranks."""
    phase = state["phase"]
    return state["step"], ORDER.index(phase) if phase in ORDER else len(ORDER)


def describe(states: list[dict[str, Any] | None]) -> list[str]:
    """A line a rank, then which ranks the others wait for."""
    lines = [f"  rank {rank}: {_describe_one(state)}" for rank, state in enumerate(states)]
    behind = furthest_behind(states)
    if not behind:
        return [*lines, "  all ranks stand in the same place: the stacks say where"]
    return [*lines, f"  furthest behind: rank {', '.join(map(str, behind))}; the others wait for it"]


def _describe_one(state: dict[str, Any] | None) -> str:
    if state is None:
        return "has never written: it did not get as far as training"
    now = time.time()
    silence = f"; SILENT for {now - state['written']:.0f} s: process {state['pid']} on {state['host']} is gone or stopped"
    silence = silence if is_silent(state) and not state["phase"].startswith(FAILED) else ""
    seconds = ", ".join(f"{phase} {spent:.1f} s" for phase, spent in sorted(state["seconds"].items(), key=lambda x: -x[1]))
    kind = "last batch" if state["phase"] == ORDER[1] else "batch"
    keys = state["keys"]
    shown = ", ".join(keys[:_KEYS_SHOWN]) + (f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else "")
    return (
        f"step {state['step']}, {state['phase']} for {now - state['since']:.1f} s; {kind}: {shown or 'none yet'}; "
        f"its time: {seconds}{silence}"
    )
