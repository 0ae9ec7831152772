#!/usr/bin/env python
"""Official VQA accuracy in percent, of a fine-tuned checkpoint or of results made elsewhere.

    tools/evaluate_vqa.py CHECKPOINT --questions Q.json --annotations A.json --images DIR_OR_TAR... --image-name '{:06d}.jpg'
    tools/evaluate_vqa.py CHECKPOINT --scenes 'data/scenes/val-*.tar'
    tools/evaluate_vqa.py --predictions results.json --annotations A.json [--questions Q.json]

`torchrun --nproc-per-node N` shares the work. Without --annotations (a test split) --out has all there is to know.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sycoca.cli import run_tool
from sycoca.data.vqa import VqaFiles, VqaScenes
from sycoca.evaluation.vqa import write_results
from sycoca.finetune.vqa import evaluate_source, load_vqa, score_file
from sycoca.log import set_up_console


def main() -> dict[str, Any]:
    parser = _build_parser()
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    if options.predictions is not None:
        if options.annotations is None:
            parser.error("--predictions needs --annotations")
        return score_file(options.predictions, annotations=Path(options.annotations), questions=options.questions)
    if options.checkpoint is None or (options.scenes is None) == (None in (options.questions, options.images)):
        parser.error("give a checkpoint with --questions and --images, or with --scenes; or --predictions")
    files = {name: getattr(options, name) for name in ("questions", "annotations", "images", "image_name")}
    source = VqaFiles(**files) if options.scenes is None else VqaScenes(shards=options.scenes)
    answerer = load_vqa(options.checkpoint, device=accelerator.device)
    answers, figures = evaluate_source(answerer, source, batch_size=options.batch_size)
    if options.out is not None and accelerator.is_main_process:
        write_results(options.out, answers)
    return figures


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder or a run folder of tools/finetune_vqa.py")
    for name in ("questions", "annotations"):
        parser.add_argument(f"--{name}", help=f"the official {name} JSON")
    parser.add_argument("--images", nargs="+", help="folders or tars (braces are expanded)")
    parser.add_argument("--image-name", default="COCO_val2014_{:012d}.jpg", help="file of an image_id; default: %(default)s")
    parser.add_argument("--scenes", nargs="+", help="shards of the embedded scenes instead")
    parser.add_argument("--predictions", type=Path, help="a results JSON to score")
    parser.add_argument("--out", type=Path, help='file of the answers, as [{"question_id": 1, "answer": "yes"}, ...]')
    parser.add_argument("--batch-size", type=int, default=64, help="questions a process")
    return parser


if __name__ == "__main__":
    run_tool(main)
