"""The text decoder: the multimodal half of the text layers, causal, attending to image patches (CoCa, section 3.2)."""

import torch
from torch import Tensor, nn

from sycoca.config import Config
from sycoca.models.blocks import AttentionCache, PreNormBlock, Stack
from sycoca.models.packing import Packing
from sycoca.models.vocabulary import Vocabulary


class TextDecoderConfig(Config):
    """Width and heads are the text encoder's: the decoder continues its token states."""

    num_layers: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.0


class TextDecoder(nn.Module):
    """Next-token logits, or their summed loss, from unimodal token states and image memory."""

    def __init__(
        self, config: TextDecoderConfig, *, width: int, num_heads: int, memory_width: int, vocab_size: int,
        recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        blocks = [
            PreNormBlock(
                width, num_heads, is_causal=True, memory_width=memory_width, mlp_ratio=config.mlp_ratio,
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        ]  # fmt: skip
        self.stack = Stack(blocks, width, recompute=recompute)
        self.vocabulary = Vocabulary(width, vocab_size)

    def forward(
        self, token_BLD: Tensor, memory_BMF: Tensor, label_BL: Tensor | None = None,
        caches: list[AttentionCache] | None = None, label_smoothing: float = 0.0, memory_row_B: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Without labels BLV logits; with labels the cross-entropy summed over all labels that are not negative.

        memory_row_B: with labels, the row of the memory that each text looks at; None: its own.
        """
        if label_BL is None:
            return self.vocabulary(self.stack(token_BLD, memory_BMF, caches=caches))
        place_L = torch.arange(1, label_BL.shape[1] + 1, device=label_BL.device)
        num_read_B = ((label_BL >= 0) * place_L).amax(dim=1)  # causal: up to the last label
        packing = Packing(num_read_B, label_BL.shape[1], memory_row_B)
        state_ND = self.stack(packing.pack(token_BLD), memory_BMF, packing=packing)
        label_N = packing.pack(label_BL)
        return self.vocabulary(state_ND[label_N >= 0], label_N[label_N >= 0], label_smoothing)
