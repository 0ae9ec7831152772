"""The image decoder of TG-MIM: masked places look at each other, the visible patches and the caption, and become pixels."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.config import Config
from sycoca.models.blocks import PreNormBlock, Stack
from sycoca.models.masking import gather_patches


class ImageDecoderConfig(Config):
    """`width: null` takes the image encoder's width."""

    width: int | None = None
    num_layers: int = 4
    num_heads: int = 8
    mlp_ratio: float = 4.0


class ImageDecoder(nn.Module):
    """Pixels of the masked patches, which look at each other, at the encoded patches and at the caption.

    Only masked places are decoded: the encoded patches are memory beside the caption's states (as in CrossMAE, arXiv
    2401.14391, but with self-attention kept), which at half the patches masked saves two fifths of a decoder over all places.
    """

    def __init__(
        self, config: ImageDecoderConfig, *, patch_width: int, num_patches: int, patch_size: int,
        memory_width: int | None, has_mask_token: bool, recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        width = config.width or patch_width
        self.embed = nn.Linear(patch_width, width)
        self.embed_caption = nn.Linear(memory_width, width) if memory_width is not None else None
        self.position_PD = nn.Parameter(torch.zeros(num_patches, width))
        self.mask_token_D = nn.Parameter(torch.zeros(width)) if has_mask_token else None
        blocks = [
            PreNormBlock(width, config.num_heads, is_causal=False, memory_width=width, mlp_ratio=config.mlp_ratio)
            for _ in range(config.num_layers)
        ]
        self.stack = Stack(blocks, width, recompute=recompute)
        self.to_pixels = nn.Linear(width, 3 * patch_size**2)

    def forward(
        self, patch_BND: Tensor, place_BN: Tensor, masked_BK: Tensor, memory_BMF: Tensor | None,
        is_real_BM: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Pixels of the masked patches, (B, masked K, 3 * patch area), in the layout of `patchify`.

        patch_BND, place_BN: encoded patches and where they stand: the visible ones, or all where the encoder had mask tokens.
        memory_BMF, is_real_BM: the caption's states and which of them are real; None where the decoder is not text-guided.
        """
        seen_BND = self.embed(patch_BND) + self.position_PD[place_BN]
        if self.mask_token_D is not None:
            query_BKD = self.mask_token_D + self.position_PD[masked_BK]
        else:
            query_BKD = gather_patches(seen_BND, masked_BK)
        if self.embed_caption is None or memory_BMF is None or is_real_BM is None:
            return self.to_pixels(self.stack(query_BKD, seen_BND))
        memory_BMD = torch.cat([self.embed_caption(memory_BMF), seen_BND], dim=1)
        is_real_BM = F.pad(is_real_BM, (0, seen_BND.shape[1]), value=True)
        return self.to_pixels(self.stack(query_BKD, memory_BMD, is_real_BM))


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, P, patch area * C): rows of patches from the top left, pixels row by row, channels last (MAE's layout)."""
    return rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(pixel_BPX: Tensor, patch_size: int) -> Tensor:
    """BCHW: the inverse of `patchify` for square images."""
    side = round(pixel_BPX.shape[1] ** 0.5)
    return rearrange(
        pixel_BPX, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size
    )
