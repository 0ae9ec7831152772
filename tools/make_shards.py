#!/usr/bin/env python
"""Make WebDataset shards of a Karpathy split, of COCO captions, or of a table of images and captions.

    tools/make_shards.py karpathy --json dataset_coco.json --images images/ --split train --out shards/coco/train
    tools/make_shards.py coco --json captions_train2017.json --images train2017.tar --out shards/coco --processes 8
    tools/make_shards.py table --file pairs.tsv --image-column path --caption-column text --root images/ --out shards/pairs

An interrupted run goes on where it stopped. Bad rows are counted in the result and listed in OUT/bad_rows.tsv.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sycoca.cli import run_tool
from sycoca.data.conversion import Conversion, Resizing, make_shards
from sycoca.data.readers import open_images, read_coco, read_karpathy, read_table


def main() -> Mapping[str, Any]:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True)
    shared.add_argument("--samples-per-shard", type=int, default=1_000)
    shared.add_argument("--captions", choices=["all", "each"], default="all", help="one sample an image, or one a caption")
    shared.add_argument("--shuffle-seed", type=int, help="without it, the order of the source")
    shared.add_argument("--resize", type=int, help="pixels; without it, images are copied byte for byte")
    shared.add_argument("--resize-mode", choices=["shortest", "squash"], default="shortest")
    shared.add_argument("--jpeg-quality", type=int, default=95, help="of resized images")
    shared.add_argument("--processes", type=int, default=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    for name in ("karpathy", "coco"):
        source = sources.add_parser(name, parents=[shared])
        source.add_argument("--json", type=Path, required=True)
        source.add_argument("--images", type=Path, required=True, help="a folder, or an uncompressed tar")
    sources.choices["karpathy"].add_argument("--split", required=True, help="train includes restval")
    table = sources.add_parser("table", parents=[shared])
    table.add_argument("--file", type=Path, required=True, help=".csv, .tsv or .parquet")
    table.add_argument("--image-column", required=True)
    table.add_argument("--caption-column", required=True)
    table.add_argument("--root", type=Path, required=True, help="the folder, or the tar, that image paths start from")
    table.add_argument("--join-rows", action="store_true", help="the rows of one image are its captions")
    options = parser.parse_args()
    resizing = Resizing(options.resize, options.resize_mode, options.jpeg_quality) if options.resize is not None else None
    conversion = Conversion(options.samples_per_shard, options.captions, resizing, options.shuffle_seed)
    return make_shards(read_source(options), options.out, conversion=conversion, num_processes=options.processes)


def read_source(options: argparse.Namespace):
    if options.source == "karpathy":
        return read_karpathy(options.json, open_images(options.images), split=options.split)
    if options.source == "coco":
        return read_coco(options.json, open_images(options.images))
    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    return read_table(options.file, open_images(options.root), **columns, is_joining_rows=options.join_rows)


if __name__ == "__main__":
    run_tool(main)
