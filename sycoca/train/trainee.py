"""What is being trained."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from sycoca.train.average import WeightAverage


@dataclass
class Trainee:
    """What is being trained, after `accelerator.prepare`."""

    accelerator: Accelerator
    task: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed keeps the optimiser's state, in files of its own."""
        return self.accelerator.state.deepspeed_plugin is not None
