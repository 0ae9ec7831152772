#!/usr/bin/env python
"""Image-to-text and text-to-image recall at 1, 5 and 10 over every caption of every image in the shards.

tools/evaluate_retrieval.py runs/scenes --shards data/scenes/val-*.tar --rerank 16
torchrun --nproc-per-node 8 tools/evaluate_retrieval.py runs/cc12m --shards 'data/coco_test/{000..004}.tar'
"""

import argparse
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

import sycoca
from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.evaluation.rerank import RerankEvaluator
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.log import set_up_console


def main() -> Mapping[str, Any]:
    options = _parse()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    subject = sycoca.load(options.checkpoint, device=accelerator.device)
    settings = {"shards": options.shards, "batch_size": options.batch_size, "num_workers": options.workers}
    config = parse_config(DataConfig, settings | {"transform": subject.config.transform}, source="--shards")
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "batch_size": options.batch_size}

    def load_batches() -> Iterable[Mapping[str, Any]]:
        return islice(build_eval_loader(config, **share), options.limit)

    if options.rerank < 1:
        return RetrievalEvaluator(load_batches(), text_batch_size=options.batch_size)(subject)
    evaluator = RerankEvaluator(
        load_batches, num_candidates=options.rerank, weight=options.rerank_weight, text_batch_size=options.batch_size
    )
    return evaluator(subject)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("--shards", nargs="+", required=True, help="tars, folders of them or patterns (braces are expanded)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process, and texts at a time")
    parser.add_argument("--workers", type=int, default=2, help="loader processes a rank")
    parser.add_argument("--limit", type=int, help="batches a process at most; default: all")
    parser.add_argument("--rerank", type=int, default=0, help="re-rank so many candidates by the captions' probability as well")
    parser.add_argument("--rerank-weight", type=float, default=0.1, help="of the mean log-probability beside the cosine")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
