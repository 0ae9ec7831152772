"""Captioning with smoothed labels: a share of each target is spread over the vocabulary (Szegedy et al., arXiv:1512.00567)."""

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sycoca.distributed import sum_over_ranks, world_size
from sycoca.models.sycoca import SyCoCa
from sycoca.objectives.captioning import CaptioningConfig, CaptioningObjective, next_token_labels
from sycoca.types import Batch, Features, Metrics


class SmoothedCaptioningConfig(CaptioningConfig):
    """Captioning from all patches."""

    label_smoothing: float = Field(ge=0, lt=1)

    def build(self) -> "SmoothedCaptioning":
        return SmoothedCaptioning(self, label_smoothing=self.label_smoothing)


class SmoothedCaptioning(CaptioningObjective):
    """Cross-entropy against (1 - s) of the next token and s of all V alike, over the tokens of all ranks.

    Holds the logits of the whole batch, which the objective of pretraining avoids; batches of fine-tuning are small.
    """

    def __init__(self, config: CaptioningConfig, *, label_smoothing: float):
        super().__init__(config)
        self.label_smoothing = label_smoothing

    def forward(self, model: SyCoCa, batch: Batch, features: Features) -> tuple[Tensor, Metrics]:
        assert model.text_decoder is not None
        label_BL = next_token_labels(batch["token"], batch["length"])
        state_BLD = model.text_decoder.stack(features.token_BLD, features.patch_BPD)
        is_target_BL = label_BL >= 0
        logit_NV, label_N = model.text_decoder.vocabulary(state_BLD[is_target_BL]).float(), label_BL[is_target_BL]
        share = world_size() / sum_over_ranks(is_target_BL.sum())
        loss = F.cross_entropy(logit_NV, label_N, reduction="sum", label_smoothing=self.label_smoothing) * share
        return loss, {"loss": loss.detach()}
