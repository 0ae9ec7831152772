"""Attentive masking: how much a caption speaks of each patch, and which patches that selects. Pure functions."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sycoca.config import Config

Which = Literal["top", "bottom", "random"]


class RelevanceConfig(Config):
    """How patches are scored against the caption (SyCoCa, section 3.2, leaves the space open)."""

    space: Literal["itc", "encoder"] = "itc"
    """`itc`: after the contrastive projections; `encoder`: before them (needs towers of one width)."""
    words: Literal["tokens", "summary", "both"] = "summary"
    """What of the caption a patch is compared with: its real tokens, the summary token, or all of these.

    The paper takes the tokens. Only the summary is trained by ITC to meet the patches, and on scenes whose object masks are
    known only the summary keeps finding the named objects (README, "Attentive masking")."""
    random_until_step: int = 0
    """Before this step scores are random numbers: relevance is still noise."""


def is_word(length_B: Tensor, num_tokens: int) -> Tensor:
    """BL: True on the caption's own tokens; bos, eos and padding are left out."""
    place_L = torch.arange(num_tokens, device=length_B.device)
    return (place_L >= 1) & (place_L < length_B[:, None] - 1)


def patch_relevance(patch_BPE: Tensor, token_BLE: Tensor, is_word_BL: Tensor) -> Tensor:
    """BP float32, in [-1, 1]: a patch's highest cosine similarity over the caption's words (SyCoCa, section 3.2). No gradient.

    A caption without words scores -1 everywhere.
    """
    patch = F.normalize(patch_BPE.detach().float(), dim=-1)
    token = F.normalize(token_BLE.detach().float(), dim=-1)
    with torch.autocast(patch.device.type, enabled=False):  # bf16 scores tie often, and ties go to the upper left
        cosine_BPL = patch @ token.transpose(1, 2)
    return cosine_BPL.masked_fill(~is_word_BL[:, None, :], -1.0).amax(dim=-1)


def num_selected(num_patches: int, share: float) -> int:
    """K: `share` of the patches, rounded to the nearest."""
    return round(num_patches * share)


def select(score_BP: Tensor, share: float, which: Which) -> tuple[Tensor, Tensor]:
    """Split patches into the selected share and the rest: indices (B, K) and (B, P - K), each in ascending order.

    `top` selects the highest scores, `bottom` the lowest, `random` any; ties go to the lower index.
    """
    num_patches = score_BP.shape[1]
    score_BP = torch.rand(score_BP.shape, device=score_BP.device) if which == "random" else score_BP
    order_BP = score_BP.argsort(dim=1, descending=which != "bottom", stable=True)
    num = num_selected(num_patches, share)
    return order_BP[:, :num].sort(dim=1).values, order_BP[:, num:].sort(dim=1).values


def gather_patches(patch_BPD: Tensor, index_BK: Tensor) -> Tensor:
    """BKD: the patches at the given places."""
    return patch_BPD.gather(1, index_BK[..., None].expand(-1, -1, patch_BPD.shape[-1]))
