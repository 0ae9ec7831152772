#!/usr/bin/env python
"""Train a small language model on captions alone, for captioners on machines that download nothing.

    accelerate launch --config_file launch/accelerate/one_process.yaml tools/train_lm.py configs/captioner/lm_NAME.yaml \\
        [key.sub=value ...]

It starts from random weights and never sees an image: it stands in for a pretrained language model, and is much weaker than
one. What it leaves in RUN_FOLDER/lm is read wherever a transformers language model is.
"""

from sycoca.cli import read_experiment, run_tool
from sycoca.finetune.language_model import TrainLMConfig, train_language_model


def main() -> dict[str, float | str | int]:
    return train_language_model(read_experiment(TrainLMConfig, __doc__))


if __name__ == "__main__":
    run_tool(main)
