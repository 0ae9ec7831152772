#!/usr/bin/env python
"""Answer a question about an image with a checkpoint of tools/finetune_vqa.py.

tools/answer.py runs/vqa_scenes photo.jpg 'what colour is the circle?'
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

from sycoca.cli import run_tool
from sycoca.evaluation.image_sources import read_image
from sycoca.finetune.vqa import load_vqa
from sycoca.log import set_up_console


def main() -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_up_console(is_main=accelerator.is_main_process)
    image = read_image(options.image)
    answerer = load_vqa(options.checkpoint, device=accelerator.device)
    return {"question": options.question, "answer": answerer.answer([image], [options.question])[0]}


if __name__ == "__main__":
    run_tool(main)
