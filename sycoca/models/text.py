"""The text encoder: a causal transformer whose learned summary token stands right after the last real token.

With right padding nothing real can see the padding, so plain causal attention without any mask tensor is exact, and no
padding content or length can change a result.
"""

import torch
from torch import Tensor, nn

from sycoca.config import Config
from sycoca.models.blocks import AttentionCache, PreNormBlock, Stack
from sycoca.models.packing import Packing


class TextConfig(Config):
    """The unimodal half of the text layers."""

    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.0


class TextEncoder(nn.Module):
    """Token states and, if built with one, the summary token's state."""

    def __init__(
        self, config: TextConfig, *, vocab_size: int, max_tokens: int, has_summary: bool, recompute: bool = False
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.position = nn.Embedding(max_tokens, config.width)
        self.summary_D = nn.Parameter(torch.zeros(config.width)) if has_summary else None
        blocks = [
            PreNormBlock(config.width, config.num_heads, is_causal=True, mlp_ratio=config.mlp_ratio, dropout=config.dropout)
            for _ in range(config.num_layers)
        ]
        self.stack = Stack(blocks, config.width, recompute=recompute)

    def forward(self, token_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """States of the tokens (BLD) and of the summary token (BD). States beyond `length_B` mean nothing."""
        x_BLD = self._embed(token_BL, first=0)
        if self.summary_D is None:
            return self._states(x_BLD, length_B), None
        place = torch.arange(token_BL.shape[1] + 1, device=token_BL.device)
        is_summary = (place == length_B[:, None])[..., None]
        x_BLD = torch.where(is_summary, self.summary_D.to(x_BLD.dtype), nn.functional.pad(x_BLD, (0, 0, 0, 1)))
        state = self._states(x_BLD, length_B + 1)
        summary_BD = state.gather(1, length_B[:, None, None].expand(-1, 1, state.shape[-1]))[:, 0]
        return state[:, :-1], summary_BD

    def step(self, token_BL: Tensor, caches: list[AttentionCache], first: int) -> Tensor:
        """States of new tokens that continue the cached ones; `first` is the place of the first new token."""
        return self.stack(self._embed(token_BL, first=first), caches=caches)

    def _states(self, x_BLD: Tensor, length_B: Tensor) -> Tensor:
        packing = Packing(length_B, x_BLD.shape[1])
        return packing.pad(self.stack(packing.pack(x_BLD), packing=packing))

    def _embed(self, token_BL: Tensor, *, first: int) -> Tensor:
        place_L = torch.arange(first, first + token_BL.shape[1], device=token_BL.device)
        return self.embedding(token_BL) + self.position(place_L)
