"""How well a caption fits its image and its references, from embeddings alone: CLIP-S and RefCLIP-S (arXiv:2104.08718)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT = 2.5
"""w of the paper: stretches the cosines of CLIP, that lie between 0 and 0.4, to about [0, 1]."""
PROMPT = "A photo depicts {}"
"""Before every caption, references too (section 3)."""


def clip_s(image_NE: Tensor, caption_NE: Tensor) -> Tensor:
    """N: w * max(cos(c, v), 0) (section 3), of raw embeddings; float32."""
    return WEIGHT * positive_cosine(image_NE, caption_NE)


def ref_clip_s(clip_s_N: Tensor, caption_NE: Tensor, references_NE: Sequence[Tensor]) -> Tensor:
    """N: the harmonic mean of CLIP-S and max(0, max_r cos(c, r)) (section 3), of raw embeddings; 0 where either is.

    `references_NE[i]` holds the references of caption i, one a row.
    """
    return harmonic_mean(clip_s_N, nearest_reference(caption_NE, references_NE))


def positive_cosine(left_NE: Tensor, right_NE: Tensor) -> Tensor:
    """N: max(cos, 0) row by row, float32."""
    return F.cosine_similarity(left_NE.float(), right_NE.float(), dim=-1).clamp_min(0)


def nearest_reference(caption_NE: Tensor, references_NE: Sequence[Tensor]) -> Tensor:
    """N: max(0, max_r cos(c, r)), float32; `references_NE[i]` holds the references of caption i, one a row."""
    nearest = [
        positive_cosine(caption_E, rows_NE).max() for caption_E, rows_NE in zip(caption_NE, references_NE, strict=True)
    ]
    return torch.stack(nearest)


def harmonic_mean(left_N: Tensor, right_N: Tensor) -> Tensor:
    """N: of two rows of non-negative scores; 0 where either is."""
    total_N = left_N + right_N
    return torch.where(total_N > 0, 2 * left_N * right_N / total_N.clamp_min(torch.finfo(total_N.dtype).tiny), 0)
