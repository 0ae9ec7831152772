"""Every initialisation rule of the model, in one place. A test fills the model with NaN, calls this, and finds no NaN left."""

import torch
from timm.layers.attention import Attention as VitAttention
from timm.layers.mlp import Mlp as VitMlp
from timm.models.vision_transformer import Block as VitBlock
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor, nn

from sycoca.models.blocks import PreNormBlock, Stack
from sycoca.models.image_decoder import ImageDecoder
from sycoca.models.pooling import AttentionPool
from sycoca.models.text import TextEncoder
from sycoca.models.vision import HidePatches, VisionEncoder
from sycoca.models.vocabulary import Vocabulary
from sycoca.types import ConfigError

TOKEN_STD = 0.02
"""Embeddings, positions, learned tokens and plain linear maps (GPT-2, BEiT, MAE)."""
POSITION_STD = 0.01
"""Text positions (CLIP)."""


def initialise(model: nn.Module) -> None:
    """Set every parameter of a freshly built model; pretrained timm weights are left as they were loaded."""
    kept = {id(p) for m in model.modules() if isinstance(m, VisionEncoder) and m.is_pretrained for p in m.vit.parameters()}
    for module in model.modules():
        if not any(id(p) in kept for p in module.parameters(recurse=False)):
            _initialise_one(module)
    for module in model.modules():
        if isinstance(module, Stack):
            _scale_stack(module)
        if isinstance(module, VisionEncoder) and not module.is_pretrained:
            _scale_vit(module.vit)
        if isinstance(module, HidePatches):
            nn.init.trunc_normal_(module.mask_token, std=TOKEN_STD)
        if isinstance(module, TextEncoder):
            nn.init.normal_(module.position.weight, std=POSITION_STD)  # here: the rule of all embeddings came after its owner's


def _initialise_one(module: nn.Module) -> None:
    match module:
        case nn.Linear():
            nn.init.trunc_normal_(module.weight, std=TOKEN_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case nn.Conv2d():
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))  # as the linear map it is (MAE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case nn.LayerNorm() if module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        case nn.Embedding():
            nn.init.normal_(module.weight, std=TOKEN_STD)
        case Vocabulary():
            nn.init.normal_(module.weight, std=TOKEN_STD)
        case LayerScale():
            nn.init.constant_(module.gamma, module.init_values)
        case _:
            _initialise_tokens(module)


def _initialise_tokens(module: nn.Module) -> None:
    """Parameters that stand alone: learned tokens, positions, queries."""
    match module:
        case TextEncoder():
            tokens = [module.summary_D]
        case ImageDecoder():
            module.position_PD.data.copy_(grid_positions(*module.position_PD.shape))
            tokens = [module.mask_token_D]
        case AttentionPool():
            tokens = [module.query_QD]
        case VisionTransformer():
            _initialise_grid(module)
            tokens = [module.cls_token, module.reg_token]
        case _:
            tokens = []
    for token in tokens:
        if token is not None:
            nn.init.trunc_normal_(token, std=TOKEN_STD)


def _initialise_grid(vit: VisionTransformer) -> None:
    """Positions of a new ViT start as sines and cosines of row and column, and are learned from there (MAE)."""
    if vit.pos_embed is None:
        return
    num_patches, width = vit.patch_embed.num_patches, vit.embed_dim
    nn.init.trunc_normal_(vit.pos_embed, std=TOKEN_STD)
    vit.pos_embed.data[0, -num_patches:] = grid_positions(num_patches, width)


def grid_positions(num_patches: int, width: int) -> Tensor:
    """(P, D): for a square grid, half of the width encodes the row and half the column (MAE, appendix A; Transformer, 3.5)."""
    side = round(num_patches**0.5)
    if side**2 != num_patches or width % 4:
        raise ConfigError(f"expected a square grid of patches and a width that divides by 4, found {num_patches}, {width}")
    rate = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    angle_SD = torch.arange(side)[:, None] * rate
    wave_SD = torch.cat([angle_SD.sin(), angle_SD.cos()], dim=1)
    row_PD, column_PD = wave_SD.repeat_interleave(side, dim=0), wave_SD.repeat(side, 1)
    return torch.cat([row_PD, column_PD], dim=1)


def _scale_stack(stack: Stack) -> None:
    for block in stack.blocks:
        assert isinstance(block, PreNormBlock)
        read, added = [block.self_attention.qkv.weight], [block.self_attention.out.weight, block.mlp.out.weight]
        if block.has_memory:
            read += [block.cross_attention.query.weight, block.cross_attention.key_value.weight]
            added.append(block.cross_attention.out.weight)
        _scale_block(read, block.mlp.fc.weight, added, num_layers=len(stack.blocks))


def _scale_vit(vit: VisionTransformer) -> None:
    """Of a new ViT. At widths far below Base the usual 0.02 is so little that attention stays even and blocks add nothing:
    at width 128 shapes are learned in half the steps or fewer without it."""
    for block in vit.blocks:
        if isinstance(block, VitBlock) and isinstance(block.attn, VitAttention) and isinstance(block.mlp, VitMlp):
            added = [block.attn.proj.weight, block.mlp.fc2.weight]
            _scale_block([block.attn.qkv.weight], block.mlp.fc1.weight, added, num_layers=len(vit.blocks))


def _scale_block(read: list[Tensor], fc: Tensor, added: list[Tensor], *, num_layers: int) -> None:
    """CLIP's rule for a pre-norm stack: what is added to the residual stream shrinks with the number of layers."""
    width = fc.shape[1]
    nn.init.normal_(fc, std=(2 * width) ** -0.5)
    for weight in read:
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    for weight in added:
        nn.init.normal_(weight, std=(width * 2 * num_layers) ** -0.5)
