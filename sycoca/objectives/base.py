"""What every objective is: a loss over a batch that says which parts of the model it needs.

The contract, tested for every member: the loss is a finite scalar whose mean over ranks is the loss of the whole batch,
and so is its gradient; metrics are detached 0-d tensors; permuting the batch changes nothing; neither does the padding.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from sycoca.config import Config
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.types import Batch, Features, Metrics


class ObjectiveConfig(Config):
    """Fields that every objective has."""

    weight: float = 1.0


class Objective(nn.Module):
    """A loss. Parameters that only the loss uses (the logit scale) live here, not in the model."""

    needs: frozenset[Part]
    needs_relevance: bool = False
    """Whether it reads the patches' relevance to the caption."""
    is_separable: bool = True
    """Whether the loss of a batch is the mean of its parts' losses, so that the batch may be worked off in chunks."""

    @abstractmethod
    def forward(self, model: SyCoCa, batch: Batch, features: Features) -> tuple[Tensor, Metrics]: ...

    def mass(self, batch: Batch) -> Tensor:
        """What the loss is a mean over, as a count (pairs unless said otherwise): chunks are weighted by it."""
        return torch.tensor(float(batch["image"].shape[0]), device=batch["image"].device)
