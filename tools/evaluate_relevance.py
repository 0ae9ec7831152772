#!/usr/bin/env python
"""Whether relevance finds the objects that captions name (AUC against true masks), and whether TG-MIM uses its text.

tools/evaluate_relevance.py runs/quickstart --shards data/scenes/val-*.tar
tools/evaluate_relevance.py runs/quickstart --shards data/scenes/val-*.tar --compare   # every space and words
"""

import argparse
from collections.abc import Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

import sycoca
from sycoca.cli import run_tool
from sycoca.evaluation.relevance import ReconstructionEvaluator, RelevanceEvaluator, read_annotated
from sycoca.models.masking import RelevanceConfig
from sycoca.pretrained import Pretrained
from sycoca.train.reconstruction import TextGuidedReconstruction, read_masked_image_config


def main() -> Mapping[str, Any]:
    options = _parse()
    subject = sycoca.load(options.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    scenes = list(islice(read_annotated(options.shards), options.limit))
    evaluate = RelevanceEvaluator(scenes, batch_size=options.batch_size)
    result: dict[str, Any] = {"relevance": evaluate(subject)}
    if options.compare:
        result["by_space_and_words"] = {
            f"{space}/{words}": evaluate(_with_relevance(subject, RelevanceConfig(space=space, words=words)))
            for space, words in product(("itc", "encoder"), ("tokens", "summary", "both"))
        }
    config = read_masked_image_config(Path(options.checkpoint))
    if config is not None and config.text_guided:
        reconstruct = ReconstructionEvaluator(scenes, batch_size=options.batch_size)
        result["reconstruction"] = reconstruct(TextGuidedReconstruction(subject, config))
    return result


def _with_relevance(subject: Pretrained, relevance: RelevanceConfig) -> Pretrained:
    return Pretrained(subject.model, subject.tokenizer, subject.config.model_copy(update={"relevance": relevance}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("--shards", nargs="+", required=True, help="tars with mask.png (the scenes' val shards)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs at a time")
    parser.add_argument("--limit", type=int, help="images at most; default: all")
    parser.add_argument("--compare", action="store_true", help="also the AUC of every space and words")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
