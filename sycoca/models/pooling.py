"""From patch tokens to one image vector: the class token, the mean, or learned queries."""

from typing import Literal

import torch
from torch import Tensor, nn

from sycoca.models.blocks import CrossAttention

Pool = Literal["cls", "mean", "attention"]


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
