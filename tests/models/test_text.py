"""The text encoder and decoder: no look into the future, no padding in any result, a summary of the whole caption."""

import pytest
import torch
from builders import EOS, MAX_TOKENS, NUM_TOKENS, VISION_WIDTH, build_batch, build_model
from torch import Tensor

from sycoca.models.blocks import AttentionCache
from sycoca.models.sycoca import SyCoCa

WITH_AND_WITHOUT_SUMMARY = pytest.mark.parametrize("parts", [{"text", "contrast", "text_decoder"}, {"text", "text_decoder"}])
MEMORY = torch.randn(4, 6, VISION_WIDTH, generator=torch.Generator().manual_seed(3))


def encode_and_decode(model: SyCoCa, token_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """The text encoder's token states, and the text decoder's logits."""
    token_BLD, _ = model.text(token_BL, length_B)
    return token_BLD, model.text_decoder(token_BLD, MEMORY)


@WITH_AND_WITHOUT_SUMMARY
@pytest.mark.parametrize("place", range(1, NUM_TOKENS))
@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_everything_from_it_on(parts: set, place: int):
    model, batch = build_model(parts), build_batch()
    full_B = torch.full((4,), NUM_TOKENS)
    changed_BL = batch["token"].clone()
    changed_BL[:, place] = (changed_BL[:, place] + 5) % EOS
    before = encode_and_decode(model, batch["token"], full_B)
    after = encode_and_decode(model, changed_BL, full_B)
    for old, new in zip(before, after, strict=True):
        assert old[:, :place].equal(new[:, :place])
        assert not torch.isclose(old[:, place:], new[:, place:]).all(dim=-1).any()


@WITH_AND_WITHOUT_SUMMARY
@torch.no_grad()
def test_what_lies_in_the_padding_changes_no_real_state(parts: set):
    model, batch = build_model(parts), build_batch()
    is_real_BL = torch.arange(NUM_TOKENS) < batch["length"][:, None]
    other_BL = torch.where(is_real_BL, batch["token"], 13)
    for old, new in zip(
        encode_and_decode(model, batch["token"], batch["length"]), encode_and_decode(model, other_BL, batch["length"])
    ):
        assert old[is_real_BL].equal(new[is_real_BL])
    assert not other_BL.equal(batch["token"])


@pytest.mark.parametrize("num_more", [1, MAX_TOKENS - NUM_TOKENS])
@torch.no_grad()
def test_the_amount_of_padding_changes_no_state_and_no_embedding(num_more: int):
    model, batch = build_model(), build_batch()
    longer_BL = torch.nn.functional.pad(batch["token"], (0, num_more), value=17)
    is_real_BL = torch.arange(NUM_TOKENS) < batch["length"][:, None]
    token_BLD, summary_BD = model.text(batch["token"], batch["length"])
    longer_BLD, longer_BD = model.text(longer_BL, batch["length"])
    torch.testing.assert_close(longer_BLD[:, :NUM_TOKENS][is_real_BL], token_BLD[is_real_BL])
    torch.testing.assert_close(longer_BD, summary_BD)
    embedding_BE = model.encode_text(batch["token"], batch["length"])
    torch.testing.assert_close(model.encode_text(longer_BL, batch["length"]), embedding_BE)


@torch.no_grad()
def test_the_summary_does_not_see_the_padding():
    model, batch = build_model(), build_batch()
    other_BL = torch.where(torch.arange(NUM_TOKENS) < batch["length"][:, None], batch["token"], 13)
    assert model.encode_text(other_BL, batch["length"]).equal(model.encode_text(batch["token"], batch["length"]))


@torch.no_grad()
def test_the_summary_sees_every_real_token_the_last_included():
    model, batch = build_model(), build_batch()
    before_BE = model.encode_text(batch["token"], batch["length"])
    for row, length in enumerate(batch["length"].tolist()):
        for place in range(length):
            changed_BL = batch["token"].clone()
            changed_BL[row, place] = (changed_BL[row, place] + 5) % EOS
            is_changed_B = ~torch.isclose(model.encode_text(changed_BL, batch["length"]), before_BE).all(dim=-1)
            assert is_changed_B.nonzero().flatten().tolist() == [row], f"token {place} of row {row}"


@torch.no_grad()
def test_the_summary_token_changes_no_token_state():
    model, batch = build_model(), build_batch()
    before_BLD, _ = model.text(batch["token"], batch["length"])
    model.text.summary_D += 1.0
    after_BLD, _ = model.text(batch["token"], batch["length"])
    is_real_BL = torch.arange(NUM_TOKENS) < batch["length"][:, None]
    assert after_BLD[is_real_BL].equal(before_BLD[is_real_BL])


@torch.no_grad()
def test_the_summary_is_what_a_sequence_ending_in_the_summary_token_gives():
    model, batch = build_model(), build_batch()
    _, summary_BD = model.text(batch["token"], batch["length"])
    for row, length in enumerate(batch["length"].tolist()):
        embedded_LD = model.text.embedding(batch["token"][row, :length]) + model.text.position(torch.arange(length))
        sequence_LD = torch.cat([embedded_LD, model.text.summary_D[None]])
        torch.testing.assert_close(model.text.stack(sequence_LD[None])[0, -1], summary_BD[row])


@torch.no_grad()
def test_every_decoded_token_sees_the_whole_image_memory():
    model, batch = build_model(), build_batch()
    token_BLD, _ = model.text(batch["token"], batch["length"])
    before_BLV = model.text_decoder(token_BLD, MEMORY)
    for patch in range(MEMORY.shape[1]):
        memory = MEMORY.clone()
        memory[:, patch] += 1.0
        assert not torch.isclose(model.text_decoder(token_BLD, memory), before_BLV).all(dim=-1).any()


@torch.no_grad()
def test_a_cache_gives_the_encoders_states_token_by_token():
    model, batch = build_model(), build_batch()
    expected_BLD, _ = model.text(batch["token"], torch.full((4,), NUM_TOKENS))
    caches = [AttentionCache() for _ in model.text.stack.blocks]
    states = [model.text.step(batch["token"][:, :2], caches, 0)]
    states += [model.text.step(batch["token"][:, [place]], caches, place) for place in range(2, NUM_TOKENS)]
    torch.testing.assert_close(torch.cat(states, dim=1), expected_BLD)
