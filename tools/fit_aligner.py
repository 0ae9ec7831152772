#!/usr/bin/env python
"""Fit a linear map from images to texts on an embedding store's pairs, and compare retrieval with and without it.

    tools/fit_aligner.py data/scenes/embeddings --out runs/aligner.safetensors --held-out val

Gives held-out recall of embeddings `raw`, `centred` by the training means, `aligned`, and `shuffled`: aligned by a map of
shuffled pairs, which must be at chance.
"""

import argparse
from pathlib import Path
from typing import Any, get_args

from sycoca.captioners.aligner import Method
from sycoca.captioners.alignment import AlignmentConfig, compare_spaces, held_out_pairs
from sycoca.captioners.embeddings import EmbeddingStore, Reading, embed_shards
from sycoca.captioners.encoder import load_encoder
from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.evaluation.retrieval import recall_metrics, retrieval_ranks
from sycoca.log import set_up_console

DEFAULTS = AlignmentConfig()


def main() -> dict[str, Any]:
    options = _parse()
    set_up_console(is_main=True)
    tree = {name: value for name, value in vars(options).items() if name in AlignmentConfig.model_fields}
    config = parse_config(AlignmentConfig, tree, source="options")
    for shards, split in ((options.shards, options.split), (options.held_out_shards, options.held_out)):
        if shards:
            embed_shards(load_encoder(options.encoder), options.store, Reading(shards, split, batch_size=64, num_workers=2))
    train = EmbeddingStore(options.store, options.split)
    image_NE, text_NE, image_of_text_N = held_out_pairs(EmbeddingStore(options.store, options.held_out))
    aligner, spaces = compare_spaces(train, image_NE, text_NE, config)
    aligner.save(options.out)
    recalls = {name: recall_metrics(retrieval_ranks(*rows, image_of_text_N, chunk=128)) for name, rows in spaces.items()}
    return {"method": config.method, "num_pairs": aligner.num_pairs, "fingerprint": train.fingerprint, **recalls}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="what tools/embed.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the aligner's file")
    for name, default, what in (("--split", "train", "fitted"), ("--held-out", "val", "retrieved")):
        parser.add_argument(name, default=default, help=f"split of the pairs that are {what} (default {default})")
    parser.add_argument("--method", choices=get_args(Method), default=DEFAULTS.method)
    parser.add_argument("--ridge", type=float, default=DEFAULTS.ridge, help="penalty of --method ridge")
    for name, kinds in (("--image-transform", DEFAULTS.image_transform), ("--text-transform", DEFAULTS.text_transform)):
        parser.add_argument(name, nargs="*", default=kinds, help="none l2 centre zscore whiten, in order")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of the shuffled pairs")
    parser.add_argument("--encoder", default="", help="embeds --shards and --held-out-shards into the store first")
    parser.add_argument("--shards", nargs="+", default=[])
    parser.add_argument("--held-out-shards", nargs="+", default=[])
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
