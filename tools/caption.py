#!/usr/bin/env python
"""Caption images with a checkpoint; with --num-return several captions each.

tools/caption.py runs/scenes photo.jpg other.png --method beam --num-beams 4 --num-return 2
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import sycoca
from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.evaluation.image_sources import read_image
from sycoca.generation import GenerationConfig
from sycoca.log import set_up_console


def main() -> Mapping[str, Any]:
    options = vars(_parse())
    checkpoint, paths, batch_size = (options.pop(name) for name in ("checkpoint", "images", "batch_size"))
    seed = options.pop("seed")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    config = parse_config(GenerationConfig, options, source="options")
    subject = sycoca.load(checkpoint, device=accelerator.device)
    generator = torch.Generator(accelerator.device).manual_seed(seed)
    captions: list[list[str]] = []
    for start in range(0, len(paths), batch_size):
        images = [read_image(path) for path in paths[start : start + batch_size]]
        captions += subject.captions(images, generation=config, generator=generator)
    written = captions if config.num_return > 1 else [of_image[0] for of_image in captions]
    return {"captions": dict(zip(map(str, paths), written, strict=True))}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--method", choices=("greedy", "beam", "top_p"), default="greedy")
    for name in ("max_tokens", "min_tokens", "num_beams", "no_repeat_ngram", "num_return"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=GenerationConfig.model_fields[name].default)
    for name in ("length_penalty", "top_p", "temperature", "repetition_penalty"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=GenerationConfig.model_fields[name].default)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of --method top_p")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
