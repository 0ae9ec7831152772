"""Every parameter has a rule: a model of NaNs comes out finite, and with the standard deviations that the rules say."""

import math

import pytest
import torch
from builders import ALL_PARTS, MAX_TOKENS, NUM_PATCHES, VOCAB_SIZE, build_batch, model_config, vision_options

from sycoca.models.init import POSITION_STD, TOKEN_STD, initialise
from sycoca.models.sycoca import ModelConfig, SyCoCa


def build_from_nothing(config: ModelConfig) -> SyCoCa:
    """On `meta`, then memory full of NaN, then initialised."""
    with torch.device("meta"):
        model = SyCoCa(config, vocab_size=VOCAB_SIZE, max_tokens=MAX_TOKENS, parts=ALL_PARTS)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor, torch.nan)
    initialise(model)
    return model


@pytest.mark.parametrize("pool", ["cls", "mean", "max", "attention"])
@pytest.mark.parametrize(
    "options", [{}, {"class_token": False}, {"reg_tokens": 3, "init_values": 1e-5}, {"qk_norm": True, "pre_norm": True}]
)
def test_no_nan_is_left_in_any_part(pool: str, options: dict):
    model = build_from_nothing(model_config(pool=pool, vision=vision_options(**options)))
    left = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    assert left == []
    assert model.encode(build_batch()).image_BE.isfinite().all()


def test_learned_tokens_do_not_start_alike():
    model = build_from_nothing(model_config(pool="attention"))
    vit = model.vision.vit
    tokens = [vit.cls_token, vit.pos_embed, model.vision.hide.mask_token, model.text.summary_D, model.image_pool.query_QD,
              model.image_decoder.position_PD]  # fmt: skip
    assert all(token.detach().std() > TOKEN_STD / 5 for token in tokens)


@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"reg_tokens": 3}])
def test_patch_positions_start_as_waves_of_row_and_column(options: dict):
    model = build_from_nothing(model_config(vision=vision_options(**options)))
    for position_PD in (model.vision.vit.pos_embed[0, -NUM_PATCHES:], model.image_decoder.position_PD):
        quarter = position_PD.shape[1] // 4
        for place in range(NUM_PATCHES):
            waves = [
                wave(number / 10_000 ** (k / quarter))
                for number in divmod(place, 3) for wave in (math.sin, math.cos) for k in range(quarter)
            ]  # fmt: skip
            torch.testing.assert_close(position_PD[place].detach(), torch.tensor(waves))


def test_standard_deviations_are_the_rules():
    text = {"width": 64, "num_layers": 3, "num_heads": 2}
    config = model_config(text=text)
    model = SyCoCa(config, vocab_size=300, max_tokens=200, parts=ALL_PARTS)
    block = model.text.stack.blocks[0]
    expected = [
        (model.text.embedding.weight, TOKEN_STD),
        (model.text.position.weight, POSITION_STD),
        (model.text_decoder.vocabulary.weight, TOKEN_STD),
        (block.self_attention.qkv.weight, 64**-0.5),
        (block.mlp.fc.weight, (2 * 64) ** -0.5),
        (block.self_attention.out.weight, (64 * 2 * 3) ** -0.5),
        (block.mlp.out.weight, (64 * 2 * 3) ** -0.5),
    ]
    for parameter, std in expected:
        assert parameter.detach().std().item() == pytest.approx(std, rel=0.1)
        assert abs(parameter.detach().mean().item()) < 0.1 * std


def test_a_new_vit_starts_by_the_rule_of_the_other_stacks():
    options = vision_options(embed_dim=64, depth=3, num_heads=2)
    model = SyCoCa(model_config(vision=options), vocab_size=VOCAB_SIZE, max_tokens=MAX_TOKENS, parts=ALL_PARTS)
    block = model.vision.vit.blocks[2]
    expected = [
        (block.attn.qkv.weight, 64**-0.5), (block.mlp.fc1.weight, (2 * 64) ** -0.5),
        (block.attn.proj.weight, (64 * 2 * 3) ** -0.5), (block.mlp.fc2.weight, (64 * 2 * 3) ** -0.5),
    ]  # fmt: skip
    for parameter, std in expected:
        assert parameter.detach().std().item() == pytest.approx(std, rel=0.1)


def test_the_same_seed_gives_the_same_weights():
    def build() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return SyCoCa(model_config(), vocab_size=VOCAB_SIZE, max_tokens=MAX_TOKENS, parts=ALL_PARTS).state_dict()

    torch.testing.assert_close(build(), build(), rtol=0, atol=0)
