"""What follows a loss or gradient that is not finite: it is written down, and training stops or goes on with the next batch."""

import json
import math
from pathlib import Path
from typing import Any

from sycoca.distributed import gather_objects, rank
from sycoca.log import logger
from sycoca.train.loop import StepReport
from sycoca.train.optim import OptimConfig
from sycoca.types import Batch, TrainingError

_KEYS_SHOWN = 8


class NonFiniteHook:
    """Writes a bad batch to `folder/step_N_rank_R.json` on every rank, and stops training or counts the skipped step.

    The first of the hooks: what comes after it may save or average the weights. Raises TrainingError, on every rank alike.
    """

    def __init__(self, plan: OptimConfig, folder: Path):
        self.plan, self.folder = plan, folder
        self.num_in_a_row = 0

    def __call__(self, report: StepReport) -> None:
        if report.is_finite:
            self.num_in_a_row = 0
            return
        self.num_in_a_row += 1
        bad = bad_metrics(report)
        write_bad_batch(self.folder, report, bad)
        found = f"step {report.step}: not finite: {describe_ranks(gather_objects((bad, report.batch['key'])))}"
        if report.is_taken:
            raise TrainingError(
                f"{found}; the engine had taken the step when it was found, so the weights are lost: go on from the last "
                "checkpoint with a lower optim.lr, or upgrade DeepSpeed to 0.19, which leaves such a step out"
            )
        where = f"; the batch is in {self.folder}"
        if self.plan.on_non_finite == "stop":
            raise TrainingError(
                f"{found}{where}. Look at it, lower optim.lr or optim.clip_norm, or set optim.on_non_finite=skip to pass over "
                "such batches; the last checkpoint is sound"
            )
        if self.num_in_a_row > self.plan.max_skipped_in_a_row:
            raise TrainingError(
                f"{found}{where}. {self.num_in_a_row} steps in a row were skipped, more than optim.max_skipped_in_a_row = "
                f"{self.plan.max_skipped_in_a_row}: it is not one batch; lower optim.lr and go on from the last checkpoint"
            )
        logger.warning("%s%s; skipped, the weights are as they were", found, where)


def bad_metrics(report: StepReport) -> list[str]:
    """This rank's metrics that are not finite: objectives' losses, or `grad_norm` alone where the fault is in the gradient."""
    return [name for name, value in report.metrics.items() if not bool(value.isfinite().all())]


def write_bad_batch(folder: Path, report: StepReport, bad: list[str]) -> None:
    """This rank's keys, token ids without padding, and metrics (null where not finite)."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = report.batch
    rows = zip(batch["token"].tolist(), batch["length"].tolist(), strict=True)
    metrics = {name: finite_or_none(value.item()) for name, value in report.metrics.items()}
    facts: dict[str, Any] = {
        "step": report.step, "rank": rank(), "lr": report.lr, "not_finite": bad, "metrics": metrics, "keys": batch["key"],
        "tokens": [row[:length] for row, length in rows],
        "keys_with_bad_pixels": keys_with_bad_pixels(batch),
    }  # fmt: skip
    path = folder / f"step_{report.step}_rank_{rank()}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def keys_with_bad_pixels(batch: Batch) -> list[str]:
    """Of the images with a pixel that is not finite; of none where a batch holds text or embeddings alone."""
    if "image" not in batch:
        return []
    is_sound = batch["image"].isfinite().flatten(1).all(dim=1)
    if "image_row" in batch:  # several samples are about one image
        is_sound = is_sound[batch["image_row"]]
    return [key for key, sound in zip(batch["key"], is_sound.tolist(), strict=True) if not sound]


def describe_ranks(found: list[tuple[list[str], list[str]]]) -> str:
    """Of every rank, what was not finite there and the first keys of its batch."""
    return "; ".join(
        f"rank {number}: {', '.join(bad) or 'nothing'} (keys {shorten(keys, _KEYS_SHOWN)})"
        for number, (bad, keys) in enumerate(found)
    )


def shorten(names: list[str], num_shown: int) -> str:
    """The first names, and how many follow."""
    rest = len(names) - num_shown
    return ", ".join(names[:num_shown]) + (f" and {rest} more" if rest > 0 else "")


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
