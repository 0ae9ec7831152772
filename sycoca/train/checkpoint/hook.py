"""When checkpoints are saved: every so many steps or minutes, after the best evaluation, when asked to stop, at the end."""

import time
from dataclasses import dataclass

from sycoca.distributed import FlagExchange, barrier
from sycoca.log import logger
from sycoca.train.checkpoint.mirror import Mirror
from sycoca.train.checkpoint.saving import Saver, point, remove_old
from sycoca.train.checkpoint.stop import STOPPED_STATUS, StopSignals
from sycoca.train.hooks import EvaluateHook, is_due
from sycoca.train.loop import StepReport, TrainState

SECONDS_PER_MINUTE = 60


@dataclass(frozen=True)
class SavePlan:
    """How often to save, 0 is never, and how many to keep."""

    steps: int
    minutes: float
    num_kept: int


class CheckpointHook:
    """Begins checkpoints when they are due and finishes them when every rank has written.

    Each rank tells the others after every step whether it was asked to stop, whether the minutes are over and whether it still
    writes; all know it after the next step, and so decide alike.
    """

    def __init__(
        self, plan: SavePlan, saver: Saver, state: TrainState, *, evaluation: EvaluateHook | None, signals: StopSignals,
        mirror: Mirror | None,
    ):  # fmt: skip
        self.plan, self.saver, self.state, self.evaluation = plan, saver, state, evaluation
        self.signals, self.mirror = signals, mirror
        accelerator = saver.trainee.accelerator
        self.is_main = accelerator.is_main_process
        self.flags = FlagExchange(3, accelerator.device)
        self.saved_at = time.monotonic()
        self.is_best = False

    def __call__(self, report: StepReport) -> None:
        is_asked_to_stop, is_time, is_writing = self.flags.receive()
        if self.saver.is_pending and not is_writing:
            self._finish()
        if self.mirror is not None:
            self.mirror.report()
        is_best = self.evaluation is not None and self.evaluation.is_best
        if is_asked_to_stop or is_time or is_best or self._is_due(report):
            self._begin(is_best)
        if report.is_last or is_asked_to_stop:
            self._end(is_asked_to_stop and not report.is_last)
        self._send()

    def _is_due(self, report: StepReport) -> bool:
        return is_due(report, self.plan.steps) or (report.is_last and self.plan.minutes > 0)

    def _send(self) -> None:
        minutes = self.plan.minutes  # one clock for all: the main process's
        is_time = self.is_main and minutes > 0 and time.monotonic() - self.saved_at >= minutes * SECONDS_PER_MINUTE
        self.flags.send([self.signals.received is not None, is_time, self.saver.is_writing])

    def _begin(self, is_best: bool) -> None:
        if self.saver.is_pending:
            logger.warning("the checkpoint before is still being written; training waits for it")
            self._finish()
        self.is_best = is_best
        self.saver.begin(self.state, metrics=self.evaluation.figures if self.evaluation is not None else {})
        self.saved_at = time.monotonic()
        if not self.saver.is_background:
            self._finish()

    def _finish(self) -> None:
        path = self.saver.finish()
        if self.is_main:
            if self.is_best:
                point(path.with_name("best"), path)
            if self.mirror is not None:
                self.mirror.send(path, is_best=self.is_best, num_kept=self.plan.num_kept)
            remove_old(path.parent, self.plan.num_kept, in_use=self.mirror.in_use if self.mirror is not None else frozenset())
        note = " (best so far)" if self.is_best else ""
        logger.info("checkpoint %s%s; training waited %.2f s for it", path, note, self.saver.seconds_waited)

    def _end(self, is_stopped: bool) -> None:
        """Wait for what is still being written and mirrored; leave the program where it was asked to stop."""
        if self.saver.is_pending:
            self._finish()
        if self.mirror is not None:
            self.mirror.wait()
        barrier()  # where one process ends, launchers soon end the others
        if is_stopped:
            logger.info("asked to stop (%s) and saved; status %d: start again", self.signals.received, STOPPED_STATUS)
            self.saver.trainee.accelerator.end_training()
            raise SystemExit(STOPPED_STATUS)
