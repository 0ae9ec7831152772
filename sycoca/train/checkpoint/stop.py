"""Asked to stop: SIGTERM and SIGUSR1 end a run at a step's boundary, with a checkpoint and a status that says: run me again."""

import signal
import threading
from types import FrameType
from typing import Any

STOPPED_STATUS = 85
"""Exit status of a run that was asked to stop and saved; launch/slurm.sh requeues the job on it (docs/resume.md)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within it, the first stop signal is noted in `received`, and the process goes on. Only a main thread can hear signals."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
