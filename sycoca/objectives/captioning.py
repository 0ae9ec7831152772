"""Captioning (IC): next-token prediction from the patches that the caption is most about."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sycoca.distributed import sum_over_ranks, world_size
from sycoca.models.masking import Which, gather_patches, select
from sycoca.models.sycoca import SyCoCa
from sycoca.models.vocabulary import IGNORED
from sycoca.objectives.base import Objective, ObjectiveConfig
from sycoca.types import Batch, Features, Metrics


class CaptioningConfig(ObjectiveConfig):
    """`drop_share` of the patches, those the caption is least about, are kept from the decoder (r_l); 0 is CoCa."""

    type: Literal["ic"] = "ic"
    drop_share: float = 0.0
    drop: Which = "bottom"
    drop_prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a training batch's patches are dropped at all; 1 is the paper. The decoder that captions a new image
    sees all patches: where it never did in training, it leans on what the choice of patches tells of the caption."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over the vocabulary."""

    def build(self) -> "CaptioningObjective":
        return CaptioningObjective(self)


class CaptioningObjective(Objective):
    """Cross-entropy of the caption's tokens, end token included, over the tokens of all ranks (SyCoCa, L_IC)."""

    needs = frozenset({"text", "text_decoder"})

    def __init__(self, config: CaptioningConfig):
        super().__init__()
        self.config = config
        self.needs_relevance = config.drop_share > 0 and config.drop != "random"

    def forward(self, model: SyCoCa, batch: Batch, features: Features) -> tuple[Tensor, Metrics]:
        assert model.text_decoder is not None
        memory_BMD = features.patch_BPD
        if self._drops():
            memory_BMD = gather_patches(memory_BMD, self._kept(features))
        label_BL = next_token_labels(batch["token"], batch["length"])
        total = model.text_decoder(features.token_BLD, memory_BMD, label_BL, label_smoothing=self.config.label_smoothing)
        num_tokens = (label_BL >= 0).sum()
        loss = total * world_size() / sum_over_ranks(num_tokens)
        return loss, {"loss": loss.detach()}

    def _drops(self) -> bool:
        config = self.config
        return config.drop_share > 0 and (not self.training or config.drop_prob == 1 or bool(torch.rand(()) < config.drop_prob))

    def mass(self, batch: Batch) -> Tensor:
        return (next_token_labels(batch["token"], batch["length"]) >= 0).sum().float()

    def _kept(self, features: Features) -> Tensor:
        score_BP = features.relevance_BP
        if score_BP is None:
            score_BP = torch.zeros(features.patch_BPD.shape[:2], device=features.patch_BPD.device)
        return select(score_BP, self.config.drop_share, self.config.drop)[1]


def next_token_labels(token_BL: Tensor, length_B: Tensor) -> Tensor:
    """BL: at place l the token at l + 1, the end token included; IGNORED from the last real token on. Ids never matter."""
    following_BL = torch.roll(token_BL, -1, dims=1)
    place_L = torch.arange(token_BL.shape[1], device=token_BL.device)
    return following_BL.masked_fill(place_L >= length_B[:, None] - 1, IGNORED)
