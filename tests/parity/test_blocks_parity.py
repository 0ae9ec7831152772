"""Our attention, blocks, contrast and optimiser against PyTorch's and open_clip's own; they differ by float32 sums alone."""

import pytest
import torch
from builders import ABLATION_ROWS, build_batch, build_task, run_backward
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from sycoca.models.blocks import CrossAttention, PreNormBlock, SelfAttention
from sycoca.models.image_decoder import patchify
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.train.optim import OptimConfig, build_optimizer, set_lr
from sycoca.types import Features

NUM_ROWS, NUM_TOKENS, WIDTH, NUM_HEADS, NUM_MEMORY = 2, 5, 12, 3, 7
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def copy_linear(target_weight: Tensor, target_bias: Tensor, source: nn.Linear) -> None:
    with torch.no_grad():
        target_weight.copy_(source.weight)
        target_bias.copy_(source.bias)


def torch_self_attention(ours: SelfAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)
    copy_linear(theirs.in_proj_weight, theirs.in_proj_bias, ours.qkv)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


def torch_cross_attention(ours: CrossAttention) -> nn.MultiheadAttention:
    """With one width for the memory too, as torch's decoder layer has it."""
    theirs = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)
    copy_linear(theirs.in_proj_weight[:WIDTH], theirs.in_proj_bias[:WIDTH], ours.query)
    copy_linear(theirs.in_proj_weight[WIDTH:], theirs.in_proj_bias[WIDTH:], ours.key_value)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


def causal_mask() -> Tensor:
    """True where torch may not attend."""
    return torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("is_causal", [True, False])
def test_self_attention_is_torchs(is_causal: bool):
    ours, x_BLD = SelfAttention(WIDTH, NUM_HEADS, is_causal=is_causal), torch.randn(NUM_ROWS, NUM_TOKENS, WIDTH)
    expected, _ = torch_self_attention(ours)(x_BLD, x_BLD, x_BLD, attn_mask=causal_mask() if is_causal else None)
    torch.testing.assert_close(ours(x_BLD), expected, **TOLERANCE)


@pytest.mark.parametrize("has_padding", [True, False])
def test_cross_attention_is_torchs(has_padding: bool):
    ours = CrossAttention(WIDTH, NUM_HEADS, memory_width=WIDTH)
    x_BLD, memory_BMD = torch.randn(NUM_ROWS, NUM_TOKENS, WIDTH), torch.randn(NUM_ROWS, NUM_MEMORY, WIDTH)
    is_real_BM = torch.arange(NUM_MEMORY) < torch.tensor([[4], [7]]) if has_padding else None
    hidden = None if is_real_BM is None else ~is_real_BM
    expected, _ = torch_cross_attention(ours)(x_BLD, memory_BMD, memory_BMD, key_padding_mask=hidden)
    torch.testing.assert_close(ours(x_BLD, memory_BMD, is_real_BM), expected, **TOLERANCE)


def test_cross_attention_to_a_memory_of_another_width_is_torchs():
    ours = CrossAttention(WIDTH, NUM_HEADS, memory_width=8)
    theirs = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True, kdim=8, vdim=8)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.query.weight)
        theirs.k_proj_weight.copy_(ours.key_value.weight[:WIDTH])
        theirs.v_proj_weight.copy_(ours.key_value.weight[WIDTH:])
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x_BLD, memory_BMF = torch.randn(NUM_ROWS, NUM_TOKENS, WIDTH), torch.randn(NUM_ROWS, NUM_MEMORY, 8)
    torch.testing.assert_close(ours(x_BLD, memory_BMF), theirs(x_BLD, memory_BMF, memory_BMF)[0], **TOLERANCE)


def randomise(block: PreNormBlock) -> PreNormBlock:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def copy_common(theirs: nn.Module, ours: PreNormBlock) -> None:
    theirs.self_attn = torch_self_attention(ours.self_attention)
    theirs.norm1.load_state_dict(ours.self_norm.state_dict())
    theirs.linear1.load_state_dict(ours.mlp.fc.state_dict())
    theirs.linear2.load_state_dict(ours.mlp.out.state_dict())


LAYER = {"d_model": WIDTH, "nhead": NUM_HEADS, "dim_feedforward": 2 * WIDTH, "dropout": 0.0, "activation": "gelu"}


def test_a_block_is_torchs_encoder_layer():
    ours = randomise(PreNormBlock(WIDTH, NUM_HEADS, is_causal=True, mlp_ratio=2.0))
    theirs = nn.TransformerEncoderLayer(**LAYER, norm_first=True, batch_first=True)
    copy_common(theirs, ours)
    theirs.norm2.load_state_dict(ours.mlp_norm.state_dict())
    x_BLD = torch.randn(NUM_ROWS, NUM_TOKENS, WIDTH)
    torch.testing.assert_close(ours(x_BLD), theirs(x_BLD, src_mask=causal_mask()), rtol=1e-4, atol=1e-5)


def test_a_block_with_memory_is_torchs_decoder_layer():
    ours = randomise(PreNormBlock(WIDTH, NUM_HEADS, is_causal=True, memory_width=WIDTH, mlp_ratio=2.0))
    theirs = nn.TransformerDecoderLayer(**LAYER, norm_first=True, batch_first=True)
    copy_common(theirs, ours)
    theirs.multihead_attn = torch_cross_attention(ours.cross_attention)
    theirs.norm2.load_state_dict(ours.cross_norm.state_dict())
    theirs.norm3.load_state_dict(ours.mlp_norm.state_dict())
    x_BLD, memory_BMD = torch.randn(NUM_ROWS, NUM_TOKENS, WIDTH), torch.randn(NUM_ROWS, NUM_MEMORY, WIDTH)
    is_real_BM = torch.arange(NUM_MEMORY) < torch.tensor([[4], [7]])
    expected = theirs(x_BLD, memory_BMD, tgt_mask=causal_mask(), memory_key_padding_mask=~is_real_BM)
    torch.testing.assert_close(ours(x_BLD, memory_BMD, is_real_BM), expected, rtol=1e-4, atol=1e-5)


def test_contrast_is_open_clips_loss_with_its_gradients():
    objective = ContrastiveConfig(init_temperature=0.05).build()
    image_BE, text_BE = (nn.functional.normalize(torch.randn(5, 10), dim=-1).requires_grad_() for _ in range(2))
    nothing = torch.zeros(0)
    loss, _ = objective(None, build_batch(5), Features(nothing, nothing, None, image_BE, text_BE))
    expected = ClipLoss()(image_BE, text_BE, objective.log_logit_scale.exp())
    torch.testing.assert_close(loss, expected)
    inputs = [image_BE, text_BE, objective.log_logit_scale]
    actual = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs), **TOLERANCE)


def test_patches_are_those_of_torchs_unfold():
    """`unfold` puts channels first in each patch; ours are last (MAE)."""
    image = torch.randn(2, 3, 8, 12)
    columns_BXP = nn.functional.unfold(image, kernel_size=4, stride=4)
    expected_BPX = columns_BXP.transpose(1, 2).unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
    assert patchify(image, 4).equal(expected_BPX)


def test_training_is_that_of_one_adamw_for_every_parameter():
    """Two optimisers, one of which has a group for each parameter and no fused kernel, take the same three steps.

    With a large eps: the bias of attention keys has no gradient but rounding, which Adam would blow up to whole steps.
    """
    plan = OptimConfig(lr=0.01, num_steps=3, warmup_steps=2, weight_decay=0.3, eps=1e-3)
    ours, theirs = build_task(ABLATION_ROWS["sycoca"]), build_task(ABLATION_ROWS["sycoca"])
    optimizer = build_optimizer(ours, plan)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    each = [
        torch.optim.AdamW([q], lr=1, betas=plan.betas, eps=plan.eps, weight_decay=decays[id(p)], foreach=False)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    ]
    for step in range(3):
        for task, optimizers in ((ours, [optimizer]), (theirs, each)):
            run_backward(task, build_batch(seed=step))
            for one in optimizers:
                set_lr(one, plan.lr_at(step))
                one.step()
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
