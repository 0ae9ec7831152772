"""The image decoder of TG-MIM: patch positions look at each other and at the caption, and become pixels."""

import torch
from einops import rearrange
from torch import Tensor, nn

from sycoca.config import Config
from sycoca.models.blocks import Block, Stack
from sycoca.models.masking import gather_patches


class ImageDecoderConfig(Config):
    """`width: null` takes the image encoder's width."""

    width: int | None = None
    num_layers: int = 4
    num_heads: int = 8
    mlp_ratio: float = 4.0


class ImageDecoder(nn.Module):
    """Pixels of the masked patches from the encoded ones and the caption's states."""

    def __init__(
        self, config: ImageDecoderConfig, *, patch_width: int, num_patches: int, patch_size: int,
        memory_width: int | None, has_mask_token: bool, recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        width = config.width or patch_width
        self.embed = nn.Linear(patch_width, width)
        self.position_PD = nn.Parameter(torch.zeros(num_patches, width))
        self.mask_token_D = nn.Parameter(torch.zeros(width)) if has_mask_token else None
        blocks = [
            Block(width, config.num_heads, is_causal=False, memory_width=memory_width, mlp_ratio=config.mlp_ratio)
            for _ in range(config.num_layers)
        ]
        self.stack = Stack(blocks, width, recompute=recompute)
        self.to_pixels = nn.Linear(width, 3 * patch_size**2)

    def forward(
        self, patch_BKD: Tensor, place_BK: Tensor, masked_BK: Tensor, memory_BMF: Tensor | None,
        is_real_BM: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Pixels of the masked patches, (B, masked K, 3 * patch area), in the layout of `patchify`.

        patch_BKD, place_BK: encoded patches and where they stand; every other place gets the mask token.
        memory_BMF, is_real_BM: the caption's states and which of them are real; None where the decoder is not text-guided.
        """
        x_BKD = self.embed(patch_BKD)
        if self.mask_token_D is not None:
            grid = self.mask_token_D.to(x_BKD.dtype).expand(x_BKD.shape[0], self.position_PD.shape[0], -1)
            x_BKD = grid.scatter(1, place_BK[..., None].expand_as(x_BKD), x_BKD)
        x_BPD = self.stack(x_BKD + self.position_PD, memory_BMF, is_real_BM)
        return self.to_pixels(gather_patches(x_BPD, masked_BK))


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, P, patch area * C): rows of patches from the top left, pixels row by row, channels last (MAE's layout)."""
    return rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(pixel_BPX: Tensor, patch_size: int) -> Tensor:
    """BCHW: the inverse of `patchify` for square images."""
    side = round(pixel_BPX.shape[1] ** 0.5)
    return rearrange(
        pixel_BPX, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size
    )
