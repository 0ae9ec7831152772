#!/usr/bin/env python
"""Fine-tune a checkpoint to answer questions about images.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_vqa.py \\
        configs/finetune/vqa_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well.
"""

from sycoca.cli import read_experiment, run_tool
from sycoca.finetune.vqa import FinetuneVqaConfig, finetune_vqa


def main() -> dict[str, float | str | int]:
    return finetune_vqa(read_experiment(FinetuneVqaConfig, __doc__))


if __name__ == "__main__":
    run_tool(main)
