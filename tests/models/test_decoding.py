"""Cached captioning steps equal the whole model's logits, step by step, whatever the beams do."""

import pytest
import torch
from builders import BOS, VISION_WIDTH, VOCAB_SIZE, build_model
from torch import Tensor

from sycoca.models.decoding import CaptionStep
from sycoca.models.sycoca import SyCoCa


def uncached_logits(model: SyCoCa, token_NT: Tensor, patch_NPD: Tensor) -> Tensor:
    token_NTD, _ = model.text(token_NT, torch.full((token_NT.shape[0],), token_NT.shape[1]))
    return model.text_decoder(token_NTD, patch_NPD)[:, -1]


@pytest.mark.parametrize("parts", [{"text", "text_decoder"}, {"text", "text_decoder", "contrast"}])
@pytest.mark.parametrize("num_prompt", [1, 3])
@torch.no_grad()
def test_cached_decoding_equals_uncached_at_every_step(parts: set, num_prompt: int):
    model, patch_BPD = build_model(parts), torch.randn(2, 6, VISION_WIDTH)
    token_BL = torch.randint(0, VOCAB_SIZE, (2, 7))
    step = CaptionStep(model, patch_BPD)
    logit_BV = step(token_BL[:, :num_prompt], None)
    for place in range(num_prompt, 7):
        torch.testing.assert_close(logit_BV, uncached_logits(model, token_BL[:, :place], patch_BPD), rtol=1e-5, atol=1e-5)
        logit_BV = step(token_BL[:, [place]], None)
    torch.testing.assert_close(logit_BV, uncached_logits(model, token_BL, patch_BPD), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cached_decoding_follows_beams_that_split_move_and_die():
    model, patch_NPD = build_model(), torch.randn(2, 6, VISION_WIDTH)
    history_NT = torch.full((2, 1), BOS)
    step = CaptionStep(model, patch_NPD)
    step(history_NT, None)
    for source in ([0, 0, 0, 1, 1, 1], [2, 1, 0, 3, 3, 3], None, [1, 0, 0, 5, 4, 3], [0, 5]):
        if source is not None:
            history_NT, patch_NPD = history_NT[source], patch_NPD[source]
        chosen_N1 = torch.randint(0, VOCAB_SIZE, (history_NT.shape[0], 1))
        history_NT = torch.cat([history_NT, chosen_N1], dim=1)
        logit_NV = step(chosen_N1, None if source is None else torch.tensor(source))
        torch.testing.assert_close(logit_NV, uncached_logits(model, history_NT, patch_NPD), rtol=1e-5, atol=1e-5)
