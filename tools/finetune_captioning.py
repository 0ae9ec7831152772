#!/usr/bin/env python
"""Fine-tune a checkpoint to write captions, by cross-entropy or self-critically on CIDEr-D.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_captioning.py \\
        configs/finetune/captioning_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well. `start.checkpoint` names what it starts from.
"""

import argparse

from sycoca.cli import run_tool
from sycoca.config import load_config
from sycoca.finetune.captioning import FinetuneCaptioningConfig, finetune_captioning


def main() -> dict[str, float | str | int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a captioning YAML of configs/finetune")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    arguments = parser.parse_args()
    return finetune_captioning(load_config(FinetuneCaptioningConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    run_tool(main)
