"""From patch tokens to one image vector: the class token, the mean, the maximum, or a learned query.

Relevance compares single patches with the caption, so a pool that lets the background speak for the objects makes it useless:
with `mean` and `cls` patches far from an object come to carry the whole image. `max`, taken over the projected patches, leaves
each direction of the shared space to the patch that shows it most (CLIPpy, arXiv 2210.09996, section 3).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sycoca.models.blocks import CrossAttention

Pool = Literal["cls", "mean", "max", "attention"]


class AttentionPool(nn.Module):
    """One learned query that attends to the patches (CoCa's contrastive pooler)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.query_QD = nn.Parameter(torch.zeros(1, width))
        self.attention = CrossAttention(width, num_heads, memory_width=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, patch_BPD: Tensor) -> Tensor:
        query = self.query_QD.expand(patch_BPD.shape[0], -1, -1)
        return self.norm(self.attention(query, patch_BPD))[:, 0]
