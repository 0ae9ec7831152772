"""The image encoder: any timm ViT, by name, that can also see a subset of its patches or mask tokens in their place."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sycoca.config import Config
from sycoca.models.activated_linear import keep_less_of_mlps
from sycoca.models.masking import gather_patches
from sycoca.types import ConfigError


class VisionConfig(Config):
    """A timm Vision Transformer; `options` go to timm's `create_model` as they are (depth, embed_dim, patch_size ...)."""

    name: str = "vit_base_patch16_224"
    pretrained: bool = False
    image_size: int = 224
    drop_path: float = 0.0
    options: dict[str, Any] = {}


class KeepPatches(nn.Module):
    """Stands where timm drops patches at random: keeps the class token and the patches that were asked for."""

    def __init__(self, num_prefix_tokens: int):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.index_BK: Tensor | None = None

    def forward(self, x_BND: Tensor) -> Tensor:
        if self.index_BK is None:
            return x_BND
        prefix, patch_BPD = x_BND[:, : self.num_prefix_tokens], x_BND[:, self.num_prefix_tokens :]
        return torch.cat([prefix, gather_patches(patch_BPD, self.index_BK)], dim=1)


class HidePatches(nn.Module):
    """Stands behind the patch embedding: puts a learned mask token where a patch is hidden (BEiT)."""

    def __init__(self, width: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.is_hidden_BP: Tensor | None = None

    def forward(self, patch_BPD: Tensor) -> Tensor:
        if self.is_hidden_BP is None:
            return patch_BPD
        return torch.where(self.is_hidden_BP[..., None], self.mask_token.to(patch_BPD.dtype), patch_BPD)


class VisionEncoder(nn.Module):
    """Patch tokens and the class token of an image. Everything runs through timm's own `forward`, which ZeRO-3 relies on."""

    def __init__(self, config: VisionConfig, *, has_mask_token: bool = False, recompute: bool = False):
        super().__init__()
        self.vit = _create_vit(config)
        self.is_pretrained = config.pretrained
        self.vit.set_grad_checkpointing(recompute)
        keep_less_of_mlps(self.vit)
        self.width: int = self.vit.embed_dim
        self.num_patches: int = self.vit.patch_embed.num_patches
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.keep = KeepPatches(self.num_prefix_tokens)
        self.vit.patch_drop = self.keep  # pyright: ignore[reportAttributeAccessIssue]
        if has_mask_token:
            self.vit.patch_embed.norm = nn.Sequential(self.vit.patch_embed.norm, HidePatches(self.width))

    @property
    def hide(self) -> HidePatches | None:
        """Where mask tokens enter. Not an attribute: a module with two names is saved twice, which safetensors refuses."""
        norm = self.vit.patch_embed.norm
        last = norm[-1] if isinstance(norm, nn.Sequential) else None
        return last if isinstance(last, HidePatches) else None

    def forward(
        self, image_BCHW: Tensor, visible_BK: Tensor | None = None, is_hidden_BP: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, P or K, D) and the class token (B, D; the patches' mean where the ViT has none).

        visible_BK: the only patches that are encoded; nothing of the others can reach the result.
        is_hidden_BP: patches that a mask token stands for; needs `has_mask_token`.
        """
        hide = self.hide
        assert is_hidden_BP is None or hide is not None, "build the encoder with has_mask_token to hide patches"
        self.keep.index_BK = visible_BK
        if hide is not None:
            hide.is_hidden_BP = is_hidden_BP
        x_BND = self.vit(image_BCHW)
        self.keep.index_BK = None
        if hide is not None:
            hide.is_hidden_BP = None
        patch_BPD = x_BND[:, self.num_prefix_tokens :]
        return patch_BPD, x_BND[:, 0] if self.num_prefix_tokens else patch_BPD.mean(dim=1)


def _create_vit(config: VisionConfig) -> VisionTransformer:
    try:
        vit = timm.create_model(
            config.name, pretrained=config.pretrained, img_size=config.image_size, num_classes=0, global_pool="",
            drop_path_rate=config.drop_path, **config.options,
        )  # fmt: skip
    except (RuntimeError, TypeError, AssertionError) as error:
        near = ", ".join(timm.list_models(f"*{config.name[:8]}*")[:5])
        raise ConfigError(f"model.vision: timm cannot build {config.name!r}: {error}; some known names: {near}") from error
    if not isinstance(vit, VisionTransformer):
        kind = type(vit).__name__
        raise ConfigError(f"model.vision.name: {config.name!r} is a {kind}; choose a timm VisionTransformer (vit_*)")
    size = vit.patch_embed.patch_size[0]
    if config.image_size % size:
        raise ConfigError(f"model.vision.image_size: {config.image_size} does not divide into patches of {size} pixels")
    return vit
