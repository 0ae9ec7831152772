"""Attention and the pre-norm transformer block that the text tower and both decoders are stacked from.

In training a stack of texts works on packed rows (models/packing.py), ND instead of BLD: all but attention treats rows alike.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sycoca.models.activated_linear import ActivatedLinear
from sycoca.models.packing import Packing


@dataclass(slots=True)
class AttentionCache:
    """Keys and values of one layer while decoding, each (B, heads, tokens, head width); empty before the first step."""

    key: Tensor | None = None
    value: Tensor | None = None
    memory_key: Tensor | None = None
    memory_value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values, and give those of all tokens so far."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, source_N: Tensor) -> None:
        """Row n becomes what row `source_N[n]` was: beams move, prompts are repeated."""
        for name in ("key", "value", "memory_key", "memory_value"):
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, rows.index_select(0, source_N))


class SelfAttention(nn.Module):
    """Multi-head self-attention; causal by the kernel's own flag, so no mask tensor is ever made."""

    def __init__(self, width: int, num_heads: int, *, is_causal: bool, dropout: float = 0.0):
        super().__init__()
        assert width % num_heads == 0, f"width {width} does not divide into {num_heads} heads"
        self.num_heads, self.is_causal, self.dropout = num_heads, is_causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, cache: AttentionCache | None = None, packing: Packing | None = None) -> Tensor:
        qkv_BLX = self.qkv(x_BLD) if packing is None else packing.pad(self.qkv(x_BLD))
        query, key, value = rearrange(qkv_BLX, "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        is_first = cache is None or cache.key is None
        assert is_first or x_BLD.shape[1] == 1, "after the prompt, tokens come one at a time"
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=self.is_causal and is_first, dropout_p=self.dropout if self.training else 0.0
        )
        mixed_BLD = rearrange(mixed, "b h l d -> b l (h d)")
        return self.out(mixed_BLD if packing is None else packing.pack(mixed_BLD))


class CrossAttention(nn.Module):
    """Multi-head attention from a sequence to memory tokens of any width."""

    def __init__(self, width: int, num_heads: int, *, memory_width: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BLD: Tensor, memory_BMF: Tensor, is_real_BM: Tensor | None = None, cache: AttentionCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:  # fmt: skip
        """`is_real_BM`: True where a memory token may be attended to; None: all of them."""
        query_BLD = self.query(x_BLD) if packing is None else packing.pad(self.query(x_BLD))
        query = rearrange(query_BLD, "b l (h d) -> b h l d", h=self.num_heads)
        key, value = self._key_value(memory_BMF, cache)
        if packing is not None and packing.memory_row_B is not None:  # projected once a memory, not once a text
            key, value = (rows.index_select(0, packing.memory_row_B) for rows in (key, value))
            is_real_BM = None if is_real_BM is None else is_real_BM[packing.memory_row_B]
        mask = None if is_real_BM is None else is_real_BM[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        mixed_BLD = rearrange(mixed, "b h l d -> b l (h d)")
        return self.out(mixed_BLD if packing is None else packing.pack(mixed_BLD))

    def _key_value(self, memory_BMF: Tensor, cache: AttentionCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.memory_key is not None and cache.memory_value is not None:
            return cache.memory_key, cache.memory_value
        key, value = rearrange(self.key_value(memory_BMF), "b m (two h d) -> two b h m d", two=2, h=self.num_heads)
        if cache is not None:
            cache.memory_key, cache.memory_value = key, value
        return key, value


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden_width: int, dropout: float = 0.0):
        super().__init__()
        self.fc = nn.Linear(width, hidden_width)
        self.out = ActivatedLinear(hidden_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.dropout(self.out(self.fc(x_BLD)))


class PreNormBlock(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention where it has a memory, MLP."""

    def __init__(
        self, width: int, num_heads: int, *, is_causal: bool, memory_width: int | None = None, mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, num_heads, is_causal=is_causal, dropout=dropout)
        self.has_memory = memory_width is not None
        if memory_width is not None:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = CrossAttention(width, num_heads, memory_width=memory_width, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(
        self,
        x_BLD: Tensor,
        memory_BMF: Tensor | None = None,
        is_real_BM: Tensor | None = None,
        cache: AttentionCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        x_BLD = x_BLD + self.self_attention(self.self_norm(x_BLD), cache, packing)
        if self.has_memory:
            assert memory_BMF is not None, "this block was built to attend to a memory"
            x_BLD = x_BLD + self.cross_attention(self.cross_norm(x_BLD), memory_BMF, is_real_BM, cache, packing)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


class Stack(nn.Module):
    """Blocks in a row and a last norm; with `recompute` activations are recomputed in the backward pass."""

    def __init__(self, blocks: list[PreNormBlock], width: int, *, recompute: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.recompute = recompute

    def forward(
        self,
        x_BLD: Tensor,
        memory_BMF: Tensor | None = None,
        is_real_BM: Tensor | None = None,
        caches: list[AttentionCache] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """States of the tokens, BLD; packed rows in and out (ND) where there is a packing."""
        for number, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x_BLD = checkpoint(block, x_BLD, memory_BMF, is_real_BM, None, packing, use_reentrant=False)  # pyright: ignore
            else:
                x_BLD = block(x_BLD, memory_BMF, is_real_BM, None if caches is None else caches[number], packing)
        return self.norm(x_BLD)
