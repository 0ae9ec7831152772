#!/usr/bin/env python
"""Fine-tune a checkpoint's image encoder to classify images.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_classification.py \\
        configs/finetune/classification_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well.
"""

from sycoca.cli import read_experiment, run_tool
from sycoca.finetune.classification import FinetuneClassificationConfig, finetune_classification


def main() -> dict[str, float | str | int]:
    return finetune_classification(read_experiment(FinetuneClassificationConfig, __doc__))


if __name__ == "__main__":
    run_tool(main)
