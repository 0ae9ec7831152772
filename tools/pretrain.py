#!/usr/bin/env python
"""Pretrain on WebDataset shards.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/pretrain.py configs/pretrain/NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well.
"""

from sycoca.cli import read_experiment, run_tool
from sycoca.train.pretrain import PretrainConfig, pretrain


def main() -> dict[str, float | str | int]:
    return pretrain(read_experiment(PretrainConfig, __doc__))


if __name__ == "__main__":
    run_tool(main)
