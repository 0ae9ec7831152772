"""A running average of the weights (EMA): what is evaluated and saved, while training goes on with the newest ones."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sycoca.train.optim import OptimConfig
from sycoca.types import ConfigError

ZERO_3 = 3


def check_average(config: OptimConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError where the engine keeps no whole weights on a rank to average."""
    plugin = accelerator.state.deepspeed_plugin
    if config.average_decay and plugin is not None and plugin.zero_stage == ZERO_3:
        raise ConfigError("optim.average_decay: ZeRO-3 has no whole weights to average; launch ZeRO-1 or 2, or set it to 0")
    if config.average_decay and accelerator.is_fsdp2:
        raise ConfigError("optim.average_decay: FSDP2 has no whole weights to average; launch ZeRO-1 or 2, or set it to 0")


class WeightAverage:
    """average = d * average + (1 - d) * weight after every step, d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The warm-up of d is the one of TensorFlow's ExponentialMovingAverage: early weights do not linger. Buffers are not averaged.
    """

    def __init__(self, task: nn.Module, decay: float):
        self.parameters = dict(task.named_parameters())
        self.decay, self.num_updates = decay, 0
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        newest = [self.parameters[name].detach() for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), newest, 1 - decay)

    def use_in(self, measure: Callable[[], Any]) -> Callable[[], Any]:
        """The same function, run while the averages stand in the weights' place."""

        def with_averages() -> Any:
            self._swap()
            try:
                return measure()
            finally:
                self._swap()

        return with_averages

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their weights."""
        return self.averages

    @torch.no_grad()
    def load_state_dict(self, averages: dict[str, Tensor], *, num_updates: int) -> None:
        """Go on from a checkpoint's averages."""
        for name, value in self.averages.items():
            value.copy_(averages[name])
        self.num_updates = num_updates

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            weight = self.parameters[name]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
