"""A loss or gradient that is not finite, in one process: nothing moves, and training stops or goes on as the settings say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from builders import ITC, build_batch, build_task

from sycoca.train.diagnosis.non_finite import NonFiniteHook, keys_with_bad_pixels, write_bad_batch
from sycoca.train.hooks import LogHook, Speed
from sycoca.train.loop import Hook, StepReport, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.types import Batch, TrainingError

NUM_STEPS = 4


class Notes:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def write(self, step: int, values) -> None:
        self.lines.append({"step": step, **values})

    def close(self) -> None: ...


def run(folder: Path, bad_steps: list[int], *, log_every: int = 1, **settings) -> tuple[dict[str, torch.Tensor], Notes]:
    """Weights and log lines after four steps on as many batches, some of them with a NaN pixel."""
    plan = OptimConfig(lr=0.1, num_steps=NUM_STEPS, warmup_steps=1, **settings)
    task, notes = build_task({"itc": ITC}), Notes()

    def batches() -> Iterator[Batch]:
        for step in range(1, NUM_STEPS + 1):
            batch = build_batch(seed=step)
            batch["position"] = {"num_dropped": {}, "worst": None, "worker": 0}
            if step in bad_steps:
                batch["image"][2, 0, 0, 0] = torch.nan
            yield batch

    speed = Speed(lambda batch: 3e9, peak_tflops=2.0)
    hooks: list[Hook] = [NonFiniteHook(plan, folder), LogHook(log_every, NUM_STEPS, [notes], speed)]
    optimizer, accelerator = build_optimizer(task, plan), Accelerator(cpu=True)
    train(task, batches(), optimizer, accelerator=accelerator, plan=plan, state=TrainState(), hooks=hooks)
    return dict(task.named_parameters()), notes


def test_training_stops_with_the_step_the_losses_and_the_keys(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"step 3: not finite: rank 0: loss, itc/loss.* \(keys image_0, image_1, image_2"):
        run(tmp_path, [3])
    [path] = tmp_path.iterdir()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "step_3_rank_0.json" and written["keys_with_bad_pixels"] == ["image_2"]
    assert written["tokens"][1] == build_batch(seed=3)["token"][1, :3].tolist() and written["metrics"]["itc/loss"] is None


def test_every_sample_about_a_bad_image_is_named():
    batch = build_batch(4)
    batch["image"][1, 0, 0, 0] = torch.nan
    assert keys_with_bad_pixels(batch) == ["image_1"]
    shared: Any = {**batch, "image": batch["image"][:2], "image_row": torch.tensor([0, 1, 1, 0])}
    assert keys_with_bad_pixels(shared) == ["image_1", "image_2"]


def test_a_bad_batch_without_images_is_written_down_too(tmp_path: Path):
    batch = {name: value for name, value in build_batch().items() if name != "image"}
    report = StepReport(7, batch, {"loss": torch.tensor(torch.nan)}, 0.1, 0.0, is_last=False)  # pyright: ignore
    write_bad_batch(tmp_path, report, ["loss"])
    written = json.loads((tmp_path / "step_7_rank_0.json").read_text(encoding="utf-8"))
    assert written["keys_with_bad_pixels"] == [] and written["keys"] == batch["key"]


def test_a_skipped_batch_leaves_finite_weights_and_is_counted_but_not_averaged(tmp_path: Path):
    weights, notes = run(tmp_path, [2, 3], log_every=NUM_STEPS, on_non_finite="skip")
    assert all(weight.isfinite().all() for weight in weights.values())
    [line] = notes.lines
    assert line["skipped_steps"] == 2 and torch.tensor(list(line.values())).isfinite().all()
    assert len(list(tmp_path.iterdir())) == 2


def test_too_many_skipped_steps_in_a_row_stop_training(tmp_path: Path):
    run(tmp_path, [1, 3], on_non_finite="skip", max_skipped_in_a_row=1)
    with pytest.raises(TrainingError, match="2 steps in a row were skipped, more than"):
        run(tmp_path, [2, 3], on_non_finite="skip", max_skipped_in_a_row=1)


def test_every_log_line_says_how_fast_how_full_and_how_well(tmp_path: Path):
    _, notes = run(tmp_path, [])
    assert len(notes.lines) == NUM_STEPS
    names = {"pairs_per_second", "wait_share", "mfu", "gflops_per_second", "memory_gib", "padding_share", "grad_norm"}
    for line in notes.lines:
        assert names | {"itc/logit_scale", "skipped_steps", "loss", "lr"} <= line.keys()
        assert line["gflops_per_second"] == pytest.approx(line["mfu"] * 2.0 * 1e3)
        assert line["memory_gib"] > 0.05 and line["padding_share"] == pytest.approx(3 / 20)
