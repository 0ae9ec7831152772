#!/usr/bin/env python
"""Pretrain on WebDataset shards.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/pretrain.py configs/pretrain/NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well.
"""

import argparse

from sycoca.cli import run_tool
from sycoca.config import load_config
from sycoca.train.pretrain import PretrainConfig, pretrain


def main() -> dict[str, float | str | int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML of configs/pretrain")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    arguments = parser.parse_args()
    return pretrain(load_config(PretrainConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    run_tool(main)
