#!/usr/bin/env python
"""Fit a lightweight captioner, caption images with it, and measure it.

    tools/captioner.py fit configs/captioner/recap_scenes.yaml [key.sub=value ...]
    tools/captioner.py caption runs/recap_scenes photo.jpg other.png --explain
    tools/captioner.py evaluate runs/recap_scenes --shards 'data/scenes/val-*.tar' --aligner runs/aligner.safetensors

What is evaluated may also be a checkpoint of ours, or a JSON file of captions, which --encoder then rates.
"""

import argparse
from pathlib import Path
from typing import Any

from sycoca.cli import run_tool
from sycoca.evaluation.caption_report import CaptionFiles, ShardReading
from sycoca.finetune.captioner_fits import fit_captioner
from sycoca.finetune.captioner_report import Judge, caption_images, report_subject
from sycoca.finetune.closed_form import find_device
from sycoca.log import set_up_console


def main() -> dict[str, Any]:
    options = _parse()
    set_up_console(is_main=True)
    if options.verb == "fit":
        return fit_captioner(options.config, options.overrides)
    device = find_device()
    if options.verb == "caption":
        return caption_images(options.captioner, options.images, device, is_explained=options.explain)
    reading = ShardReading(options.shards, options.batch_size, options.workers, options.limit)
    files, judge = CaptionFiles(None, None, "", options.out, options.per_image), Judge(options.encoder, options.aligner)
    return report_subject(options.captioner, device, reading=reading, judge=judge, files=files)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fit, caption, evaluate = map(verbs.add_parser, ("fit", "caption", "evaluate"))
    fit.add_argument("config", help="a YAML of configs/captioner/")
    fit.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    for verb in (caption, evaluate):
        verb.add_argument("captioner", type=Path, help="the folder that was fitted")
    caption.add_argument("images", nargs="+", type=Path)
    caption.add_argument("--explain", action="store_true", help="say what was retrieved, and how candidates were rated")
    evaluate.add_argument("--shards", nargs="+", default=[], help="tars, folders of them or patterns (braces are expanded)")
    evaluate.add_argument("--encoder", help="rates the captions; the captioner's own if not given")
    evaluate.add_argument("--aligner", type=Path, help="for aCLIP-S and RefaCLIP-S (tools/fit_aligner.py)")
    for name in ("out", "per-image"):
        evaluate.add_argument(f"--{name}", type=Path, help="write captions (and each one's scores) there")
    for name, default in (("batch-size", 32), ("workers", 2), ("limit", None)):
        evaluate.add_argument(f"--{name}", type=int, default=default, help="batches a process" if name == "limit" else None)
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
