#!/usr/bin/env python
"""Fine-tune a checkpoint's image encoder to classify images.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_classification.py \\
        configs/finetune/classification_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well.
"""

import argparse

from sycoca.cli import run_tool
from sycoca.config import load_config
from sycoca.finetune.classification import FinetuneClassificationConfig, finetune_classification


def main() -> dict[str, float | str | int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a classification_*.yaml of configs/finetune")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    arguments = parser.parse_args()
    return finetune_classification(load_config(FinetuneClassificationConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    run_tool(main)
