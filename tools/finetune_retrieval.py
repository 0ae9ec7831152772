#!/usr/bin/env python
"""Fine-tune a checkpoint to compare images with texts, by image-text contrast.

    accelerate launch --config_file launch/accelerate/ddp.yaml tools/finetune_retrieval.py \\
        configs/finetune/retrieval_NAME.yaml [key.sub=value ...]

`torchrun` and plain `python` work as well. `start.checkpoint` names what it starts from.
"""

from sycoca.cli import read_experiment, run_tool
from sycoca.finetune.retrieval import FinetuneRetrievalConfig, finetune_retrieval


def main() -> dict[str, float | str | int]:
    return finetune_retrieval(read_experiment(FinetuneRetrievalConfig, __doc__))


if __name__ == "__main__":
    run_tool(main)
