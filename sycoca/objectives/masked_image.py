"""Text-guided masked image modelling (TG-MIM): the patches the caption is most about, from the others and the caption."""

from typing import Literal

import torch
from torch import Tensor

from sycoca.models.image_decoder import patchify
from sycoca.models.masking import Which, gather_patches, select
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.objectives.base import Objective, ObjectiveConfig
from sycoca.types import Batch, Features, Metrics

VARIANCE_FLOOR = 1e-6
"""MAE's, under the root when pixels are normalised per patch."""


class MaskedImageConfig(ObjectiveConfig):
    """`mask_share` of the patches is hidden (r_h): by default those the caption is most about.

    encode: `visible` encodes the visible patches only (MAE), `mask_tokens` puts mask tokens into the encoder (BEiT),
    `features` hides patches of the full encoding, which has seen them: it leaks, and is there to be compared.
    """

    type: Literal["tg_mim"] = "tg_mim"
    mask_share: float = 0.5
    mask: Which = "top"
    encode: Literal["visible", "mask_tokens", "features"] = "visible"
    text_guided: bool = True
    norm_pixels: bool = True
    loss: Literal["l2", "l1"] = "l2"

    def build(self) -> "MaskedImageObjective":
        return MaskedImageObjective(self)


class MaskedImageObjective(Objective):
    """Pixel error on masked patches only (SyCoCa, L_TM)."""

    def __init__(self, config: MaskedImageConfig):
        super().__init__()
        self.config = config
        self.needs_relevance = config.mask != "random"
        parts: set[Part] = {"image_decoder"}
        if config.text_guided:
            parts |= {"text", "text_guidance"}
        if config.encode == "mask_tokens":
            parts |= {"encoder_mask_token"}
        self.needs = frozenset(parts)

    def forward(self, model: SyCoCa, batch: Batch, features: Features) -> tuple[Tensor, Metrics]:
        masked_BK, visible_BK = self.split(features)
        pixel_BKX = self.reconstruct(model, batch, features, masked_BK, visible_BK)
        target_BKX = gather_patches(patch_targets(batch["image"], model.vision.patch_size, self.config.norm_pixels), masked_BK)
        error = pixel_BKX.float() - target_BKX
        loss = (error.square() if self.config.loss == "l2" else error.abs()).mean()
        return loss, {"loss": loss.detach()}

    def split(self, features: Features) -> tuple[Tensor, Tensor]:
        """Places of the masked and of the visible patches."""
        score_BP = features.relevance_BP
        if score_BP is None:
            score_BP = torch.zeros(features.patch_BPD.shape[:2], device=features.patch_BPD.device)
        return select(score_BP, self.config.mask_share, self.config.mask)

    def reconstruct(
        self, model: SyCoCa, batch: Batch, features: Features, masked_BK: Tensor, visible_BK: Tensor
    ) -> Tensor:
        """Pixels of the masked patches (in the target's scale), B, K, 3 * patch area."""
        assert model.image_decoder is not None
        patch_BND, place_BN = self._encode(model, batch, features, masked_BK, visible_BK)
        memory, is_real = caption_memory(features, batch["length"]) if self.config.text_guided else (None, None)
        return model.image_decoder(patch_BND, place_BN, masked_BK, memory, is_real)

    def _encode(
        self, model: SyCoCa, batch: Batch, features: Features, masked_BK: Tensor, visible_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.config.encode == "visible":
            return model.vision(batch["image"], visible_BK=visible_BK)[0], visible_BK
        if self.config.encode == "features":
            return gather_patches(features.patch_BPD, visible_BK), visible_BK
        num_patches = features.patch_BPD.shape[1]
        is_hidden_BP = torch.zeros(features.patch_BPD.shape[:2], dtype=torch.bool, device=masked_BK.device)
        patch_BPD = model.vision(batch["image"], is_hidden_BP=is_hidden_BP.scatter(1, masked_BK, True))[0]
        return patch_BPD, torch.arange(num_patches, device=masked_BK.device).expand(patch_BPD.shape[0], -1)


def caption_memory(features: Features, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """The caption for the image decoder: the summary and the token states (BMD), and which of them are real (BM)."""
    assert features.summary_BD is not None
    memory_BMD = torch.cat([features.summary_BD[:, None], features.token_BLD], dim=1)
    place_M = torch.arange(memory_BMD.shape[1], device=length_B.device)
    return memory_BMD, place_M <= length_B[:, None]


def patch_targets(image_BCHW: Tensor, patch_size: int, is_normalised: bool) -> Tensor:
    """BPX: the pixels of every patch, each patch at zero mean and unit variance if normalised (MAE, section 3)."""
    pixel_BPX = patchify(image_BCHW, patch_size)
    if not is_normalised:
        return pixel_BPX
    variance, mean = torch.var_mean(pixel_BPX, dim=-1, keepdim=True)
    return (pixel_BPX - mean) / (variance + VARIANCE_FLOOR).sqrt()
