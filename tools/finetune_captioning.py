#!/usr/bin/env python
"""Fine-tune a checkpoint to write captions, by cross-entropy or self-critically on CIDEr-D.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_captioning.py \\
        configs/finetune/captioning_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well. `start.checkpoint` names what it starts from.
"""

from sycoca.cli import read_experiment, run_tool
from sycoca.finetune.captioning import FinetuneCaptioningConfig, finetune_captioning


def main() -> dict[str, float | str | int]:
    return finetune_captioning(read_experiment(FinetuneCaptioningConfig, __doc__))


if __name__ == "__main__":
    run_tool(main)
