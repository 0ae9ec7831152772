#!/usr/bin/env python
"""BLEU, ROUGE-L, CIDEr (METEOR and SPICE where Java is), times 100: of a checkpoint's captions, or of captions in a file.

tools/evaluate_captioning.py runs/scenes --shards data/scenes/val-*.tar --method beam --out predictions.json
tools/evaluate_captioning.py --predictions results.json --references dataset_coco.json --split test
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import sycoca
from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.evaluation.caption_report import CaptionFiles, ShardReading, report_captioner, report_files
from sycoca.generation import GenerationConfig
from sycoca.log import set_up_console


def main() -> dict[str, Any]:
    options = _parse()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    files = CaptionFiles(options.predictions, options.references, options.split, options.out, options.per_image)
    if options.checkpoint is None:
        return report_files(files)
    choices = {name: value for name, value in vars(options).items() if name in GenerationConfig.model_fields}
    config = parse_config(GenerationConfig, choices, source="options")
    reading = ShardReading(options.shards, options.batch_size, options.workers, options.limit)
    subject = sycoca.load(options.checkpoint, device=accelerator.device)
    encoder = sycoca.load(options.clip_score, device=accelerator.device) if options.clip_score else None
    generator = torch.Generator(accelerator.device).manual_seed(options.seed)
    caption = partial(subject.caption, generation=config, generator=generator)
    return report_captioner(subject, caption, reading=reading, encoder=encoder, files=files)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint or run folder; without it --predictions are scored")
    parser.add_argument("--shards", nargs="+", default=[], help="tars, folders of them or patterns (braces are expanded)")
    parser.add_argument("--predictions", type=Path, help="COCO results, or {id: caption}")
    parser.add_argument("--references", type=Path, help="COCO captions, a Karpathy split file, or {id: [captions]}")
    parser.add_argument("--split", default="test", help="of a Karpathy split file")
    parser.add_argument("--out", type=Path, help="write the checkpoint's captions there, as COCO results")
    parser.add_argument("--per-image", type=Path, help="write each image's captions and scores there")
    parser.add_argument("--clip-score", help="a checkpoint that rates the captions by CLIP-S and RefCLIP-S")
    for name, default in (("batch-size", 32), ("workers", 2), ("limit", None), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help="batches a process" if name == "limit" else None)
    for name in [name for name in GenerationConfig.model_fields if name not in ("num_return", "stop_early")]:
        default = GenerationConfig.model_fields[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
