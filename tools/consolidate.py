#!/usr/bin/env python
"""Any checkpoint (plain, DDP, ZeRO-1/2/3) as one safetensors file: read again and compared, by keys and by a forward pass.

tools/consolidate.py runs/NAME/checkpoints/last model.safetensors [--weights averaged] [--from-shards]
"""

import argparse
from pathlib import Path
from typing import Any

from sycoca.cli import run_tool
from sycoca.pretrained import find_checkpoint
from sycoca.train.checkpoint.consolidate import consolidate


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder for its best or last one")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--weights", choices=("newest", "averaged"), default="newest", help="averaged: of optim.average_decay")
    parser.add_argument("--from-shards", action="store_true", help="rebuild them from DeepSpeed's files")
    options = parser.parse_args()
    is_checkpoint = (options.checkpoint / "meta.json").is_file()
    path = options.checkpoint if is_checkpoint else find_checkpoint(options.checkpoint)
    return consolidate(path, options.out, choice=options.weights, from_shards=options.from_shards)


if __name__ == "__main__":
    run_tool(main)
