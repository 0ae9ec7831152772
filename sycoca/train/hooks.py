"""What happens around the steps: the log, evaluation, samples. Each is called after every step on every rank."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
from torch import Tensor

from sycoca.data.position import DropCounter
from sycoca.distributed import gather_objects, mean_over_ranks, world_size
from sycoca.log import Tracker, logger
from sycoca.train.average import WeightAverage
from sycoca.train.diagnosis.phases import EVALUATION
from sycoca.train.loop import StepReport, TrainState
from sycoca.types import Batch


def is_due(report: StepReport, every: int) -> bool:
    """Every so many steps and at the end; 0 is never."""
    return every > 0 and (report.step % every == 0 or report.is_last)


@dataclass
class AverageHook:
    """Takes the weights into their running average after every step."""

    average: WeightAverage

    def __call__(self, report: StepReport) -> None:
        if report.is_taken:
            self.average.update()


@dataclass
class Speed:
    """What turns batches into operations a second, and these into a share of the device's peak; without a count, nothing."""

    count_flops: Callable[[Batch], float] | None = None
    peak_tflops: float | None = None

    def count(self, batch: Batch) -> float:
        """Operations of a training step on this batch."""
        return self.count_flops(batch) if self.count_flops is not None else 0.0

    def figures(self, flops_per_second: float) -> dict[str, float]:
        """Of one device: GFLOP/s where they are counted, and model FLOPs utilisation (MFU) where the peak is known."""
        if self.count_flops is None:
            return {}
        achieved = {"gflops_per_second": flops_per_second / 1e9}
        return achieved if self.peak_tflops is None else achieved | {"mfu": flops_per_second / (self.peak_tflops * 1e12)}


def memory_gib() -> float:
    """Most memory ever allocated on this process's GPU, or, without one, what the process now holds of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class LogHook:
    """Means since the last line, over all ranks: to the console, JSONL and trackers. Skipped steps are only counted."""

    def __init__(self, every: int, num_steps: int, trackers: list[Tracker], speed: Speed | None = None):
        self.every, self.num_steps, self.trackers = every, num_steps, trackers
        self.speed = speed or Speed()
        self.drops = DropCounter()
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_steps_seen = self.num_skipped = self.num_pairs = self.num_tokens = self.num_columns = 0
        self.wait_seconds = self.num_flops = 0.0
        self.started = time.perf_counter()

    def __call__(self, report: StepReport) -> None:
        if report.is_finite:
            for name, value in report.metrics.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value.float()
        self.num_skipped += not report.is_finite
        self.num_steps_seen += 1
        self.num_flops += self.speed.count(report.batch)
        self.num_pairs += len(report.batch["key"])
        self.num_columns += report.batch["token"].numel()
        self.num_tokens += int(report.batch["length"].sum())
        self.wait_seconds += report.wait_seconds
        self.drops.add(report.batch["position"])
        if is_due(report, self.every):
            self._write(report)
            self._clear()

    def _write(self, report: StepReport) -> None:
        num_good = self.num_steps_seen - self.num_skipped
        values = {name: mean_over_ranks(total / num_good).item() for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.started
        facts = gather_objects((dict(self.drops.counts), self.num_flops, memory_gib()))
        values |= {
            "lr": report.lr,
            "pairs_per_second": self.num_pairs * world_size() / seconds,
            "wait_share": self.wait_seconds / seconds,
            "padding_share": 1 - self.num_tokens / self.num_columns,
            "memory_gib": max(memory for _, _, memory in facts),
            "skipped_steps": float(self.num_skipped),
            **self.speed.figures(sum(flops for _, flops, _ in facts) / world_size() / seconds),
        }
        dropped = sum((Counter(counts) for counts, _, _ in facts), Counter())
        values |= {f"dropped/{reason}": float(number) for reason, number in dropped.items()}
        values |= self.drops.source_shares()
        eta = timedelta(seconds=int((self.num_steps - report.step) * seconds / self.num_steps_seen))
        logger.info("%s", self._line(report.step, values, eta))
        if dropped and report.is_last:
            logger.info("data: %s", self.drops.line())
        for tracker in self.trackers:
            tracker.write(report.step, values)

    def _line(self, step: int, values: dict[str, float], eta: timedelta) -> str:
        losses = "  ".join(f"{name.removesuffix('/loss')} {value:.3f}" for name, value in values.items() if "loss" in name)
        dropped = sum(value for name, value in values.items() if name.startswith("dropped/"))
        return (
            f"step {step}/{self.num_steps}  {losses}  lr {values['lr']:.2e}  {values['pairs_per_second']:.1f} pairs/s  "
            f"wait {values['wait_share']:.0%}  {self._use(values)}  dropped {dropped:.0f}  ETA {eta}"
        )

    def _use(self, values: dict[str, float]) -> str:
        """How much of the device is used, and what went wrong."""
        flops = values.get("gflops_per_second")
        speed = f"MFU {values['mfu']:.0%}" if "mfu" in values else "" if flops is None else f"{flops:.0f} GFLOP/s"
        skipped = f"skipped {self.num_skipped}" if self.num_skipped else ""
        return "  ".join(filter(None, (speed, f"{values['memory_gib']:.1f} GiB", skipped)))


@dataclass
class EvaluateHook:
    """Runs the evaluators on the model as it stands; keeps the newest figures and whether they are the best so far."""

    every: int
    evaluate: Callable[[], dict[str, float]]
    choose_by: str
    state: TrainState
    trackers: list[Tracker]
    is_best: bool = False

    def __post_init__(self) -> None:
        self.figures: dict[str, float] = {}

    def __call__(self, report: StepReport) -> None:
        self.is_best = False
        if not is_due(report, self.every):
            return
        with self.state.clock.within(EVALUATION):
            self.figures = self.evaluate()
        score = self.figures[self.choose_by]
        if self.state.best is None or score > self.state.best:
            self.state.best, self.is_best = score, True
        logger.info("evaluation at step %d: %s", report.step, "  ".join(f"{k} {v:.2f}" for k, v in self.figures.items()))
        for tracker in self.trackers:
            tracker.write(report.step, {f"eval/{name}": value for name, value in self.figures.items()})


@dataclass
class SampleHook:
    """Writes what the model makes of a few held-out pairs."""

    every: int
    write: Callable[[int], None]

    def __call__(self, report: StepReport) -> None:
        if is_due(report, self.every):
            self.write(report.step)
