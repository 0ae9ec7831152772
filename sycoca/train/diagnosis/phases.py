"""What this process is doing, and where its time went: written by the training loop, read by the watchdog's thread."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STARTING, WAITING, FORWARD, BACKWARD, STEP = "starting", "waiting for data", "forward", "backward", "step"
LOGGING, EVALUATION, SAMPLES, SAVING, DONE = "logging", "evaluation", "samples", "saving", "done"
ORDER = (STARTING, WAITING, FORWARD, BACKWARD, STEP, LOGGING, EVALUATION, SAMPLES, SAVING, DONE)
"""As a step goes through them: of two ranks in one step, the one in the earlier phase is behind. Under DeepSpeed the
optimiser's step is part of `backward`."""


class PhaseClock:
    """The present phase and the seconds spent in each. On a GPU work is queued: its time is counted where it is waited for."""

    def __init__(self) -> None:
        self.phase, self.step = STARTING, 0
        self.keys: Sequence[str] = ()
        """Of the newest batch; while waiting for data, of the one before."""
        self.seconds: dict[str, float] = {}
        self.since = time.monotonic()

    def enter(self, phase: str) -> None:
        """End the present phase and begin another."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Another phase for a while, then the one before again."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def so_far(self) -> dict[str, float]:
        """Seconds a phase, the present one counted."""
        seconds, phase, since = dict(self.seconds), self.phase, self.since
        return {**seconds, phase: seconds.get(phase, 0.0) + time.monotonic() - since}


def in_phase(clock: PhaseClock, phase: str, call: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same function of one argument, its time counted under a phase of its own."""

    def timed(argument: Any) -> None:
        with clock.within(phase):
            call(argument)

    return timed
