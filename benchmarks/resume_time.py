#!/usr/bin/env python
"""Seconds to resume a run after 10 and after 10,000 steps: from reading the checkpoint to the end of the next step.

    python benchmarks/resume_time.py [--steps 10 10000] [--repeats 3]

The smoke-sized model on scenes drawn for it. The first checkpoint is real; those of later steps are it with another step and
with the place in the data at which that many steps would have arrived, and are resumed by the code that resumes every run.
The last line is one JSON object: the median seconds by number of steps, and `ratio`, the last over the first.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sycoca.config import load_config
from sycoca.data.scenes import write_scenes
from sycoca.train.checkpoint.checksums import CHECKSUMS, write_checksums
from sycoca.train.checkpoint.saving import point
from sycoca.train.pretrain import PretrainConfig, pretrain

SMOKE = Path(__file__).parents[1] / "configs/pretrain/smoke.yaml"
NUM_SAMPLES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DATA"] = name
        write_scenes(folder / "scenes32", num_train=NUM_SAMPLES, num_val=2, size=32, samples_per_shard=20)
        first = options.steps[0]
        train(folder / "first", num_steps=first, checkpoint_every=first)
        source = (folder / "first/checkpoints/last").resolve()
        seconds: dict[int, list[float]] = {steps: [] for steps in options.steps}
        for _ in range(options.repeats):
            for steps in options.steps:
                run = folder / f"run_{steps}"
                pretend(source, run / "checkpoints" / f"step_{steps:08d}", steps=steps)
                started = time.perf_counter()
                result = train(run, num_steps=steps + 1, checkpoint_every=0)
                seconds[steps].append(time.perf_counter() - started)
                assert result["step"] == steps + 1
                shutil.rmtree(run)
    medians = {steps: statistics.median(measured) for steps, measured in seconds.items()}
    ratio = medians[options.steps[-1]] / medians[options.steps[0]]
    print(json.dumps({"seconds": medians, "ratio": ratio, "repeats": options.repeats}))


def train(folder: Path, *, num_steps: int, checkpoint_every: int) -> dict[str, Any]:
    """A run of the smoke configuration, or what is left of it."""
    changes = (f"run.folder={folder}", f"optim.num_steps={num_steps}", f"run.checkpoint_every={checkpoint_every}")
    config = load_config(PretrainConfig, SMOKE, [*changes, "run.sample_every=0", "evaluate.shards=[]"])
    return pretrain(config)


def pretend(source: Path, target: Path, *, steps: int) -> None:
    """A checkpoint of as many steps: the same place in the epoch, as many epochs later as the steps more take."""
    shutil.copytree(source, target)
    meta = json.loads((target / "meta.json").read_text())
    batch_size = meta["num_pairs"] // meta["step"]
    later = (steps - meta["step"]) * batch_size // NUM_SAMPLES
    (target / "meta.json").write_text(json.dumps(meta | {"step": steps, "num_pairs": steps * batch_size}))
    position = json.loads((target / "state/rank_0.json").read_text())
    for stands in position["workers"].values():
        stands["epoch"] += later
    (target / "state/rank_0.json").write_text(json.dumps(position))
    (target / CHECKSUMS).unlink()
    write_checksums(target, {})
    point(target.with_name("last"), target)


if __name__ == "__main__":
    main()
