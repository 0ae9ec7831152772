#!/usr/bin/env python
"""Make the embedded data set: rendered scenes as WebDataset shards, with class names, captions and a tokenizer.

    tools/make_scenes.py data/scenes --num-train 20000 --num-val 1000 --processes 2

A complete folder of the same settings is left as it is.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sycoca.cli import run_tool
from sycoca.data.scenes import write_scenes


def main() -> Mapping[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--num-train", type=int, default=20_000)
    parser.add_argument("--num-val", type=int, default=1_000)
    parser.add_argument("--size", type=int, default=64, help="side of the image in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples-per-shard", type=int, default=1_000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    return write_scenes(
        options.out,
        num_train=options.num_train,
        num_val=options.num_val,
        size=options.size,
        seed=options.seed,
        samples_per_shard=options.samples_per_shard,
        num_processes=options.processes,
    )


if __name__ == "__main__":
    run_tool(main)
