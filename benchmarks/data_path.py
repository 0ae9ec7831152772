"""Samples a second and core: our loader against open_clip's own, on the same shards, alternating in one run.

    python benchmarks/data_path.py FOLDER [--rounds 5] [--samples 1500] [--size 224] [--workers 0,1,2,3]

FOLDER holds img2dataset-like *.tar with jpg and txt. Both loaders run in this process on one thread, do the same kind of
crop (224 px, 0.9 to 1.0 of the area, bicubic) and CLIP's tokens. Cost is processor time, which other people's jobs on the
machine change less than wall time. With --workers, our loader alone is then measured with so many loading processes, in wall
time, against the first number named, again alternating. The table goes to standard error; the last line of standard output is
JSON with the medians over rounds of ours / open_clip, and of each number of workers / the first.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sycoca.data.pipeline import DataConfig, build_train_loader
from sycoca.data.tokenizer import build_tokenizer


def main() -> None:
    args = _parse()
    torch.set_num_threads(1)
    loaders = {"sycoca": _build_ours(args), "open_clip": _build_open_clip(args)}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(args.rounds + 1):
        for name, run in loaders.items():
            rate = _measure(run)
            if number:  # round 0 warms up the page cache and the libraries
                rates[name].append(rate)
    for name, found in rates.items():
        core, wall = (statistics.median(column) for column in zip(*found))
        print(f"{name:10s} {core:8.1f} samples/s of processor time {wall:8.1f} samples/s of wall time", file=sys.stderr)
    pairs = list(zip(rates["sycoca"], rates["open_clip"]))
    ratios = {
        "core_ratio": round(statistics.median(ours[0] / theirs[0] for ours, theirs in pairs), 3),
        "wall_ratio": round(statistics.median(ours[1] / theirs[1] for ours, theirs in pairs), 3),
    }
    by_workers = _compare_workers(args) if args.workers else {}
    print(json.dumps({"benchmark": "data_path", "shards": args.folder.name, **ratios, **by_workers}), flush=True)


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of *.tar shards, each sample a jpg and a txt")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each loader (default 5)")
    parser.add_argument("--samples", type=int, default=1500, help="samples a round (default 1500)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--workers", type=_parse_counts, default=[], help="numbers of loading processes to compare, as 0,1,2,3")
    return parser.parse_args()


def _parse_counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _compare_workers(args: Namespace) -> dict[str, dict[str, float]]:
    """Medians over rounds of samples a second of wall time, as ratios to the first number of workers."""
    loaders = {number: _build_ours(args, num_workers=number) for number in args.workers}
    rates: dict[int, list[float]] = {number: [] for number in loaders}
    for number_of_round in range(args.rounds + 1):
        for number, run in loaders.items():
            _, wall = _measure(run)
            if number_of_round:  # round 0 starts the processes
                rates[number].append(wall)
    first = rates[args.workers[0]]
    ratios = {str(number): statistics.median(a / b for a, b in zip(found, first)) for number, found in rates.items()}
    for number, ratio in ratios.items():
        wall = statistics.median(rates[int(number)])
        print(f"{number} workers {wall:8.1f} samples/s of wall time, ratio {ratio:.2f}", file=sys.stderr)
    return {"workers_wall_ratio": {number: round(ratio, 3) for number, ratio in ratios.items()}}


def _measure(run: Callable[[], int]) -> tuple[float, float]:
    """Samples a second of processor time, and of wall time."""
    core, wall = time.process_time(), time.perf_counter()
    num_samples = run()
    return num_samples / (time.process_time() - core), num_samples / (time.perf_counter() - wall)


def _build_ours(args: Namespace, num_workers: int = 0) -> Callable[[], int]:
    size = {"size": args.size}
    tree = {"shards": [str(args.folder)], "batch_size": args.batch_size, "num_workers": num_workers, "transform": size}
    loader = build_train_loader(DataConfig.model_validate(tree), build_tokenizer("clip"), seed=0, rank=0, world_size=1)
    batches = iter(loader)
    num_batches = -(-args.samples // args.batch_size)
    return lambda: sum(len(batch["key"]) for batch in itertools.islice(batches, num_batches))


def _build_open_clip(args: Namespace) -> Callable[[], int]:
    """open_clip's training data set as `open_clip_train.main` builds it, with its own transform and tokenizer."""
    from open_clip import image_transform
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip_train import data

    # open_clip 3.3 was written for webdataset 0.2 and stops at the end-of-shard marks of 1.0: leave them out.
    data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    settings = Namespace(
        train_data="::".join(sorted(map(str, args.folder.glob("*.tar")))),
        train_num_samples=args.samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=args.batch_size,
        workers=0,
        world_size=1,
        seed=0,
    )
    transform = image_transform(args.size, is_train=True)
    loader = data.get_wds_dataset(settings, transform, is_train=True, tokenizer=SimpleTokenizer()).dataloader
    return lambda: sum(len(images) for images, _ in loader)


if __name__ == "__main__":
    main()
