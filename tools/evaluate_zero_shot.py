#!/usr/bin/env python
"""Zero-shot classification of labelled images: top-1, top-5 and mean per-class accuracy in percent.

    tools/evaluate_zero_shot.py runs/scenes --images data/scenes/val-*.tar --templates scenes
    torchrun --nproc-per-node 8 tools/evaluate_zero_shot.py runs/cc12m --images imagenet/val --classes imagenet

Images are a folder or a tar of `<class>/<file>`, or shards whose samples carry their label.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

import sycoca
from sycoca.cli import run_tool
from sycoca.evaluation import zero_shot
from sycoca.evaluation.class_prompts import read_classes, read_templates
from sycoca.evaluation.image_sources import batch_images, labelled_images, list_labels
from sycoca.log import logger, set_up_console


def main() -> Mapping[str, Any]:
    options = _parse()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    labels = list_labels(options.images)
    class_names = read_classes(options.classes) if options.classes else zero_shot.take_as_classes(labels)
    places = zero_shot.match_labels(labels, class_names)
    subject = sycoca.load(options.checkpoint, device=accelerator.device)
    images = labelled_images(options.images, rank=accelerator.process_index, world_size=accelerator.num_processes)
    batches = batch_images(images, subject.transform, places=places, batch_size=options.batch_size)
    logger.info("%d classes, %d processes on %s", len(class_names), accelerator.num_processes, accelerator.device.type)
    evaluator = zero_shot.ZeroShotEvaluator(batches, class_names=class_names, templates=read_templates(options.templates))
    counts = evaluator.count(subject)
    table = {"per_class": zero_shot.class_table(counts, class_names)} if options.per_class else {}
    return {**zero_shot.accuracy_metrics(counts), **table}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("--images", nargs="+", required=True, help="folder, tar or shards (braces are expanded)")
    parser.add_argument("--classes", help="cifar10, imagenet, FILE.json or FILE.txt; default: the labels found with the images")
    parser.add_argument("--templates", default="simple", help="openai (80 prompts), simple (7), scenes, FILE.json or FILE.txt")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--per-class", action="store_true", help="add the accuracy of each class")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
