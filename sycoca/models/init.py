"""Every initialisation rule of the model, in one place. A test fills the model with NaN, calls this, and finds no NaN left."""

from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import nn

from sycoca.models.blocks import Block, Stack
from sycoca.models.image_decoder import ImageDecoder
from sycoca.models.pooling import AttentionPool
from sycoca.models.text import TextEncoder
from sycoca.models.vision import HidePatches, VisionEncoder
from sycoca.models.vocabulary import Vocabulary

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
            _scale_by_depth(module)
        if isinstance(module, HidePatches):
            nn.init.trunc_normal_(module.mask_token, std=TOKEN_STD)


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
            nn.init.normal_(module.position.weight, std=POSITION_STD)
            tokens = [module.summary_D]
        case ImageDecoder():
            tokens = [module.position_PD, module.mask_token_D]
        case AttentionPool():
            tokens = [module.query_QD]
        case VisionTransformer():
            tokens = [module.cls_token, module.reg_token, module.pos_embed]
        case _:
            tokens = []
    for token in tokens:
        if token is not None:
            nn.init.trunc_normal_(token, std=TOKEN_STD)


def _scale_by_depth(stack: Stack) -> None:
    """CLIP's rule for a pre-norm stack: what is added to the residual stream shrinks with the number of layers."""
    num_layers = max(len(stack.blocks), 1)
    for block in stack.blocks:
        assert isinstance(block, Block)
        width = block.mlp.fc.in_features
        nn.init.normal_(block.self_attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.mlp.fc.weight, std=(2 * width) ** -0.5)
        added = [block.self_attention.out, block.mlp.out]
        if block.has_memory:
            nn.init.normal_(block.cross_attention.query.weight, std=width**-0.5)
            nn.init.normal_(block.cross_attention.key_value.weight, std=block.cross_attention.key_value.in_features**-0.5)
            added.append(block.cross_attention.out)
        for linear in added:
            nn.init.normal_(linear.weight, std=(width * 2 * num_layers) ** -0.5)
