"""The optimiser, its parameter groups, and the learning rate as a pure function of the step."""

import math
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from sycoca.config import Config
from sycoca.distributed import split_like
from sycoca.models.vocabulary import Vocabulary
from sycoca.objectives.base import Objective


class OptimConfig(Config):
    """AdamW with linear warm-up and cosine decay. `lr` is the peak rate."""

    lr: float
    num_steps: int
    warmup_steps: int = 2000
    final_lr_share: float = 0.0
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_norm: float = 1.0
    num_chunks: int = 1
    """Work each batch off in so many pieces (gradient caching): less memory, the same gradients."""
    layer_decay: float = 1.0
    """Each layer learns at this share of the rate of the layer above it; for fine-tuning (0.65 in BEiT-3 and MAE, Base)."""
    head_lr_scale: float = 1.0
    """Factor of the rate of a head that starts from random weights."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is not finite: the run ends, or the batch is left out; it is written down."""
    max_skipped_in_a_row: int = Field(default=10, ge=0)
    """Skipped steps that may follow each other; one more stops the run."""
    average_decay: float = 0.0
    """Of a running average of the weights, which is then what is evaluated and saved (0.9999 is usual; 0: no average)."""

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear to `lr`, then a cosine to `final_lr_share * lr`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        share = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return self.lr * (self.final_lr_share + (1 - self.final_lr_share) * share)


def build_optimizer(
    task: nn.Module, config: OptimConfig, scales: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over three groups: matrices (decayed); norms, biases, embeddings and tokens; the objectives' own parameters.

    Each falls into as many as there are factors of the learning rate in `scales`.
    """
    groups = split_by_scale(group_parameters(task, config.weight_decay), scales or {})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def group_parameters(task: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter once; decided by the first module that owns it (tied: the embedding), never by its name."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    of_losses: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in task.modules():
        is_matrix = _is_matrix(module)
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if isinstance(module, Objective):
                of_losses.append(parameter)
            else:
                (decayed if is_matrix and parameter.ndim > 1 else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": of_losses, "weight_decay": 0.0},
    ]


def _is_matrix(module: nn.Module) -> bool:
    """Whether its weight is one; also of GPT-2's layers, whose library is slow to import and there if the model is."""
    library = sys.modules.get("transformers.pytorch_utils")
    kinds = (nn.Linear, nn.Conv2d, Vocabulary, *([library.Conv1D] if library is not None else []))
    return isinstance(module, kinds)


def split_by_scale(groups: list[dict[str, Any]], scales: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """The groups that hold anything, each split by its parameters' factors of the learning rate (`lr_scale`)."""
    split = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        split += [{**group, "params": parameters, "lr_scale": scale} for scale, parameters in sorted(by_scale.items())]
    return split


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate, times the group's own factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take a whole state, as one process saves it; where FSDP2 splits a parameter, this rank's share of what goes with it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        like = parameters[number]
        shaped = {name: split_like(value, like) for name, value in values.items() if value.shape == like.shape}
        state["state"][number] = {**values, **shaped}
    optimizer.load_state_dict(state)
