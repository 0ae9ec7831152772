#!/usr/bin/env python
"""Logistic regression on a checkpoint's frozen image features: top-1, top-5 and mean per-class accuracy in percent.

    tools/linear_probe.py runs/quickstart --train 'data/scenes/train-*.tar' --val 'data/scenes/val-*.tar'
    torchrun --nproc-per-node 8 tools/linear_probe.py runs/cc12m --train imagenet/train --val imagenet/val --pool mean

Images are folders or tars of `<class>/<file>` (or `<split>/<class>/<file>`), or shards whose samples carry their label. The
strength of the penalty is chosen on a share of the training images that is held out; then all of them are fitted.
"""

import argparse
from collections.abc import Mapping
from typing import Any, get_args

import torch
from accelerate import Accelerator

from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.finetune.classification_model import ImagePool
from sycoca.finetune.linear_probe import LinearProbeConfig, linear_probe
from sycoca.log import set_up_console

DEFAULTS = {name: field.default for name, field in LinearProbeConfig.model_fields.items()}


def main() -> Mapping[str, Any]:
    options = vars(_parse())
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    start = {name: options.pop(name) for name in ("checkpoint", "weights", "image_size")}
    sources = {name: {"images": options.pop(name), "split": options.pop(f"{name}_split")} for name in ("train", "val")}
    config = parse_config(LinearProbeConfig, {"start": start, **sources, **options}, source="options")
    return linear_probe(config, accelerator.device)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    for name in ("train", "val"):
        parser.add_argument(f"--{name}", nargs="+", required=True, help="folders, tars or shards (braces are expanded)")
        parser.add_argument(f"--{name}-split", help="folder of that split, where the classes lie below one")
    parser.add_argument("--weights", choices=("checkpoint", "random"), default="checkpoint", help="random: the floor")
    parser.add_argument("--image-size", type=int, help="pixels a side; default: the checkpoint's")
    parser.add_argument("--pool", choices=get_args(ImagePool), default=DEFAULTS["pool"], help="embedding: after the projection")
    for name in ("batch_size", "num_workers", "max_iterations", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=DEFAULTS[name])
    parser.add_argument("--held-out-share", type=float, default=DEFAULTS["held_out_share"])
    parser.add_argument("--precision", choices=("float32", "float64"), default=DEFAULTS["precision"], help="of the fit")
    return parser.parse_args()


if __name__ == "__main__":
    run_tool(main)
