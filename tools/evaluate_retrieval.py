#!/usr/bin/env python
"""Image-to-text and text-to-image recall at 1, 5 and 10 over every caption of every image in the shards.

tools/evaluate_retrieval.py runs/scenes --shards data/scenes/val-*.tar
torchrun --nproc-per-node 8 tools/evaluate_retrieval.py runs/cc12m --shards 'data/coco_test/{000..004}.tar'
"""

import argparse
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

import sycoca
from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.log import set_up_console


def main() -> Mapping[str, Any]:
    options = _parse()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    subject = sycoca.load(options.checkpoint, device=accelerator.device)
    settings = {
        "shards": options.shards,
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "transform": subject.config.transform,
    }
    loader = build_eval_loader(
        parse_config(DataConfig, settings, source="--shards"),
        subject.tokenizer,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        batch_size=options.batch_size,
    )
    batches = islice(loader, options.limit)
    return RetrievalEvaluator(batches, text_batch_size=options.batch_size)(subject)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("--shards", nargs="+", required=True, help="tars, folders of them or patterns (braces are expanded)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process, and texts at a time")
    parser.add_argument("--workers", type=int, default=2, help="loader processes a rank")
    parser.add_argument("--limit", type=int, help="batches a process at most; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
