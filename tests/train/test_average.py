"""The running average of weights: its formula, and that it stands in for the weights only while it is measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sycoca.train.average import WeightAverage, check_average
from sycoca.train.optim import OptimConfig
from sycoca.types import ConfigError


def train_a_little(num_steps: int, decay: float) -> tuple[nn.Linear, WeightAverage, list[torch.Tensor]]:
    """A layer whose weights take random steps, its average, and every state of its weights."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    average = WeightAverage(layer, decay)
    states = [layer.weight.detach().clone()]
    for _ in range(num_steps):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update()
        states.append(layer.weight.detach().clone())
    return layer, average, states


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_the_average_is_that_of_a_plain_loop(decay: float):
    _, average, states = train_a_little(5, decay)
    expected = states[0].double()
    for number, state in enumerate(states[1:]):
        share = min(decay, (1 + number) / (10 + number))
        expected = share * expected + (1 - share) * state.double()
    torch.testing.assert_close(average.state_dict()["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_average_is_used_while_measuring_and_the_newest_weights_come_back():
    layer, average, states = train_a_little(3, 0.9)
    kept = average.state_dict()["weight"].clone()
    seen = average.use_in(lambda: layer.weight.detach().clone())()
    assert seen.equal(kept)
    assert not seen.equal(states[-1])
    assert layer.weight.equal(states[-1])
    assert average.state_dict()["weight"].equal(kept)


def test_the_newest_weights_come_back_after_an_error():
    layer, average, states = train_a_little(3, 0.9)

    def fail() -> None:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        average.use_in(fail)()
    assert layer.weight.equal(states[-1])


@pytest.mark.parametrize(("zero_stage", "is_fsdp2", "refused"), [(3, False, "ZeRO-3"), (None, True, "FSDP2"), (2, False, "")])
def test_an_engine_without_whole_weights_is_refused(zero_stage: int | None, is_fsdp2: bool, refused: str):
    plugin = SimpleNamespace(zero_stage=zero_stage) if zero_stage else None
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), is_fsdp2=is_fsdp2)
    check_average(OptimConfig(lr=1.0, num_steps=1), accelerator)
    config = OptimConfig(lr=1.0, num_steps=1, average_decay=0.9)
    if not refused:
        check_average(config, accelerator)
        return
    with pytest.raises(ConfigError, match=f"{refused} has no whole weights to average; launch ZeRO-1 or 2, or set it to 0"):
        check_average(config, accelerator)
