#!/usr/bin/env python
"""Build, change and look into a datastore of captions. Each verb takes the datastore's folder first.

    tools/build_datastore.py build data/store --embeddings coco/vit_l14 --aligner runs/aligner.safetensors --index IVF1024,Flat
    tools/build_datastore.py add|swap data/store --texts domain.txt --encoder open_clip:ViT-L-14/openai
"""

import argparse
from pathlib import Path
from typing import Any

from sycoca.captioners.datastore_files import load_datastore, save_datastore
from sycoca.captioners.datastore_verbs import BuildPlan, RowSource, begin_datastore, read_rows, rows_to_keep
from sycoca.captioners.row_index import EXACT, NUM_PROBES
from sycoca.cli import run_tool
from sycoca.log import set_up_console


def main() -> dict[str, Any]:
    options = _parse()
    set_up_console(is_main=True)
    source = RowSource._make(getattr(options, name, None) for name in RowSource._fields)  # filter and inspect have none
    if options.verb == "build":
        plan = BuildPlan(options.transform, options.aligner, options.index, options.probes)
        datastore = begin_datastore(source, plan, allow_held_out=options.allow_held_out)
    else:
        datastore = load_datastore(options.datastore)
    if options.verb in ("add", "swap"):
        change = datastore.extend if options.verb == "add" else datastore.swap
        change(read_rows(source), allow_held_out=options.allow_held_out)
    elif options.verb == "filter":
        datastore.filter(rows_to_keep(min_score=options.min_score, origin=options.origin, split=options.split))
    if options.verb != "inspect":
        save_datastore(datastore, options.datastore)
    return datastore.inspect()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build, add, swap, filtering, inspect = map(verbs.add_parser, ("build", "add", "swap", "filter", "inspect"))
    for verb in (build, add, swap, filtering, inspect):
        verb.add_argument("datastore", type=Path, help="its folder")
    for verb in (build, add, swap):
        verb.add_argument("--embeddings", type=Path, help="captions of what tools/embed.py wrote")
        verb.add_argument("--split", default="train", help="of the embeddings")
        verb.add_argument("--texts", type=Path, help="a text a line, or .jsonl with text, source, split, origin, score")
        verb.add_argument("--encoder", help="what embeds --texts")
        verb.add_argument("--allow-held-out", action="store_true", help="take rows of other splits than train and restval")
    build.add_argument("--transform", nargs="*", default=["l2"], help="of the rows: none l2 centre zscore whiten, in order")
    build.add_argument("--aligner", type=Path, help="take its texts' transform, then l2, instead of --transform")
    for name, default, what in (("--index", EXACT, "of FAISS; Flat is exact"), ("--probes", NUM_PROBES, "lists looked into")):
        build.add_argument(name, type=type(default), default=default, help=what)
    for name, kind in (("--min-score", float), ("--origin", str), ("--split", str)):
        filtering.add_argument(name, type=kind, help="keep rows of it only, or of this score or more")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
