#!/usr/bin/env python
"""Fine-tune a checkpoint to answer questions about images.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_vqa.py \\
        configs/finetune/vqa_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well.
"""

import argparse

from sycoca.cli import run_tool
from sycoca.config import load_config
from sycoca.finetune.vqa import FinetuneVqaConfig, finetune_vqa


def main() -> dict[str, float | str | int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a vqa_*.yaml of configs/finetune")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    arguments = parser.parse_args()
    return finetune_vqa(load_config(FinetuneVqaConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    run_tool(main)
