"""SmallCap's cross-attention: its size, what it leaves alone, and transformers' own cross-attention with the same weights."""

import hashlib
from typing import Any

import pytest
import torch
from builders import shake
from tiny_lms import CAUSAL, build_causal, build_lm, prompts
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sycoca.captioners.adapters import CrossAttention, CrossAttentionAdapters
from sycoca.captioners.lm import CaptionLM, Condition
from sycoca.captioners.prefix import PrefixMapper
from sycoca.generation import GenerationConfig
from sycoca.types import ConfigError

MEMORY_WIDTH, NUM_MEMORY = 5, 4
GREEDY = GenerationConfig(max_tokens=6)


def build_memory(num: int, *, width: int = MEMORY_WIDTH, seed: int = 7) -> torch.Tensor:
    return torch.randn(num, NUM_MEMORY, width, generator=torch.Generator().manual_seed(seed))


def digest(module: nn.Module) -> str:
    """Of every weight and buffer."""
    state = module.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def caption_loss(lm: CaptionLM, condition: Condition) -> torch.Tensor:
    rows = [lm.encode_caption(text, max_tokens=6) for text in ("two cats sit", "the dog", "a dog runs")]
    token_NT, length_N = lm.pad_captions(rows)
    return -lm.log_probs(prompts(lm), token_NT, length_N, condition).sum() / length_N.sum()


@pytest.mark.parametrize(("reduction", "millions"), [(1, 28), (2, 14), (4, 7), (8, 3.5), (16, 1.75)])
def test_gpt2_base_trains_as_many_parameters_as_the_paper_says(reduction: int, millions: float):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
        adapters = CrossAttentionAdapters(model, memory_width=768, reduction=reduction)
    inner = 768 // reduction
    num = sum(parameter.numel() for parameter in adapters.parameters())
    assert num == 12 * (769 * inner + 769 * 2 * inner + (inner + 1) * 768)
    assert num / 1e6 == pytest.approx(millions, rel=0.02)


@torch.no_grad()
def test_unreduced_adapters_are_transformers_own_cross_attention():
    own = build_causal("gpt2", add_cross_attention=True)
    shake(own, std=0.3)
    plain = build_causal("gpt2")
    lacking, left_over = plain.load_state_dict(own.state_dict(), strict=False)
    assert not lacking and all("cross" in name for name in left_over)
    adapters = CrossAttentionAdapters(plain, memory_width=12, reduction=1).eval()
    for mine, block in zip(adapters.layers, own.transformer.h):
        assert isinstance(mine, CrossAttention)
        theirs: Any = block.crossattention
        block.ln_cross_attn.weight.fill_(1.0)
        block.ln_cross_attn.bias.zero_()
        for linear, conv in [(mine.query, theirs.q_attn), (mine.key_value, theirs.c_attn), (mine.out, theirs.c_proj)]:
            linear.weight.copy_(conv.weight.T)
            linear.bias.copy_(conv.bias)
    ids, memory_NMF = torch.tensor([[1, 5, 7, 6], [1, 9, 8, 5]]), build_memory(2, width=12)
    with adapters.project(memory_NMF).attended():
        logits = plain.eval()(ids).logits
    torch.testing.assert_close(logits, own.eval()(ids, encoder_hidden_states=memory_NMF).logits, atol=1e-5, rtol=1e-5)


def test_new_adapters_begin_as_gpt2_does_but_for_what_they_add():
    adapters = CrossAttentionAdapters(build_causal("gpt2"), memory_width=64, reduction=1)
    for layer in adapters.layers:
        assert isinstance(layer, CrossAttention)
        drawn = torch.cat([layer.query.weight.flatten(), layer.key_value.weight.flatten()])
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1) and drawn.mean().item() == pytest.approx(0, abs=0.002)
        assert not any(value.any() for value in (layer.out.weight, layer.query.bias, layer.key_value.bias, layer.out.bias))


@pytest.mark.parametrize("kind", CAUSAL)
def test_new_adapters_leave_the_model_as_it_was_and_trained_ones_look_at_the_image(kind: str):
    lm, untouched = build_lm(kind), build_lm(kind)
    adapters = lm.add_adapters(MEMORY_WIDTH, reduction=2)
    condition, other = (Condition(memory_NMF=build_memory(3, seed=seed)) for seed in (7, 8))
    plain = untouched.generate(prompts(lm), GREEDY)
    new = lm.generate(prompts(lm), GREEDY, condition)
    torch.testing.assert_close(new.log_prob_NJT, plain.log_prob_NJT)
    shake(adapters, std=0.5)
    seen, seen_other = (lm.generate(prompts(lm), GREEDY, image) for image in (condition, other))
    assert not torch.allclose(seen.score_NJ, plain.score_NJ) and not torch.allclose(seen.score_NJ, seen_other.score_NJ)


@pytest.mark.parametrize("kind", CAUSAL)
def test_only_adapters_get_gradients_and_only_they_change(kind: str):
    lm = build_lm(kind)
    adapters = lm.add_adapters(MEMORY_WIDTH, reduction=2)
    shake(adapters)
    lm.train()
    assert lm.trained().keys() == {f"adapters.{name}" for name, _ in adapters.named_parameters()}
    before, before_adapters = digest(lm.model), digest(adapters)
    optimizer = torch.optim.AdamW(lm.trained().values(), lr=1e-2)
    caption_loss(lm, Condition(memory_NMF=build_memory(3))).backward()
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    for name, parameter in lm.trained().items():
        is_key_bias = name.endswith("key_value.bias")  # a shift of all keys alike changes no attention: half of it is zero
        assert parameter.grad is not None and (parameter.grad != 0).float().mean() > (0.4 if is_key_bias else 0.9), name
    optimizer.step()
    assert digest(lm.model) == before and digest(adapters) != before_adapters


def test_a_prefix_changes_the_caption_and_passes_gradients_to_its_mapper_alone():
    lm = build_lm()
    mapper = PrefixMapper(9, lm.width, num_vectors=4)
    hidden = 4 * lm.width // 2
    assert [tuple(parameter.shape) for parameter in mapper.parameters()] == [
        (hidden, 9), (hidden,), (4 * lm.width, hidden), (4 * lm.width,),
    ]  # fmt: skip
    embedding_NE = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    condition = Condition(prefix_NQD=mapper(embedding_NE))
    assert condition.prefix_NQD is not None and condition.prefix_NQD.shape == (3, 4, lm.width)
    scores = [lm.generate(prompts(lm), GREEDY, image).score_NJ for image in (condition, Condition())]
    assert not torch.allclose(*scores)
    before = digest(lm)
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=1e-2)
    loss = caption_loss(lm, condition)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mapper.parameters())
    assert all(parameter.grad is None for parameter in lm.parameters())
    optimizer.step()
    assert digest(lm) == before
    assert caption_loss(lm, Condition(prefix_NQD=mapper(embedding_NE))) < loss


def test_the_memory_s_keys_are_made_once_for_a_whole_decoding_run():
    lm = build_lm()
    shake(lm.add_adapters(MEMORY_WIDTH, reduction=2))
    calls: list[int] = []
    for layer in lm.adapters.layers if lm.adapters is not None else []:
        assert isinstance(layer, CrossAttention)
        layer.key_value.register_forward_hook(lambda *_: calls.append(1))
    beam = GenerationConfig(method="beam", num_beams=3, max_tokens=6)
    lm.generate(prompts(lm), beam, Condition(memory_NMF=build_memory(3)))
    assert len(calls) == 2, "once for each of two layers"


def test_adapters_and_memory_go_together():
    lm = build_lm()
    with pytest.raises(AssertionError, match="go together"):
        lm.generate(prompts(lm), GREEDY, Condition(memory_NMF=build_memory(3)))
    lm.add_adapters(MEMORY_WIDTH, reduction=2)
    with pytest.raises(AssertionError, match="go together"):
        lm.generate(prompts(lm), GREEDY)


def test_what_adapters_cannot_be_built_for_is_refused():
    with pytest.raises(ConfigError, match="'t5' needs a line"):
        build_lm("t5").add_adapters(MEMORY_WIDTH)
    with pytest.raises(ConfigError, match="reduction: the model is 12 wide with 2 heads"):
        build_lm().add_adapters(MEMORY_WIDTH, reduction=5)
    lm = build_lm()
    lm.add_adapters(MEMORY_WIDTH, reduction=2)
    with pytest.raises(ConfigError, match="adapters already"):
        lm.add_adapters(MEMORY_WIDTH, reduction=2)
