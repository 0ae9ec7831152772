#!/usr/bin/env python
"""Embed the images and captions of shards once, into a store that aligners and datastores are made from.

    tools/embed.py runs/quickstart --shards 'data/scenes/train-*.tar' --split train --out data/scenes/embeddings
    torchrun --nproc-per-node 8 tools/embed.py open_clip:ViT-L-14/openai --shards coco/train --split train --out coco/vit_l14

The encoder is a checkpoint or run folder of ours, open_clip:MODEL/WEIGHTS or transformers:NAME_OR_FOLDER. Shards that the store
holds already are kept; processes share the others. Say --split as it is: datastores take training captions only.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sycoca.captioners.embeddings import Reading, embed_shards
from sycoca.captioners.encoder import load_encoder
from sycoca.cli import run_tool
from sycoca.log import set_up_console


def main() -> Mapping[str, Any]:
    options = _parse()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    encoder = load_encoder(options.encoder, accelerator.device)
    return embed_shards(encoder, options.out, Reading(options.shards, options.split, options.batch_size, options.workers))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a checkpoint of ours, open_clip:MODEL/WEIGHTS or transformers:NAME_OR_FOLDER")
    parser.add_argument("--shards", nargs="+", required=True, help="tars, folders of them or patterns (braces are expanded)")
    parser.add_argument("--split", required=True, help="what these shards are: train, val, test ...")
    parser.add_argument("--out", type=Path, required=True, help="the store; of one encoder, with any number of splits")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process at a time")
    parser.add_argument("--workers", type=int, default=2, help="loader processes a rank")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
