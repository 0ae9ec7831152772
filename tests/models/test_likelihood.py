"""The log-probability of given captions: token by token against the whole logits, and against what decoding says of its own."""

import pytest
import torch
from builders import BOS, EOS, MAX_TOKENS, build_batch, build_model, model_config

from sycoca.data.transforms import TransformConfig
from sycoca.generation import GenerationConfig, decode
from sycoca.models.decoding import CaptionStep
from sycoca.models.likelihood import token_log_probs
from sycoca.models.masking import RelevanceConfig
from sycoca.pretrained import Pretrained, PretrainedConfig

PARTS = {"text", "text_decoder"}


@pytest.mark.parametrize("rows_a_chunk", [1, 9, 512])
def test_each_token_has_its_own_log_probability_whatever_the_chunk(rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sycoca.models.likelihood.ROWS_A_CHUNK", rows_a_chunk)
    model, batch = build_model(PARTS), build_batch()
    features = model.encode(batch)
    log_prob_BLV = model.text_decoder(features.token_BLD, features.patch_BPD).log_softmax(-1)
    found = token_log_probs(model, features.patch_BPD, batch["token"], batch["length"])
    for row, length in enumerate(batch["length"].tolist()):
        for place in range(found.shape[1]):
            expected = log_prob_BLV[row, place, batch["token"][row, place + 1]] if place < length - 1 else torch.zeros(())
            torch.testing.assert_close(found[row, place], expected)


@pytest.mark.parametrize("rows_a_chunk", [1, 512])
def test_its_gradient_is_that_of_the_whole_logits(rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sycoca.models.likelihood.ROWS_A_CHUNK", rows_a_chunk)
    model, batch = build_model(PARTS), build_batch()
    weight = model.text_decoder.vocabulary.weight
    features = model.encode(batch)
    logit_BLV = model.text_decoder(features.token_BLD, features.patch_BPD)[:, :-1]
    chosen_BL = logit_BLV.log_softmax(-1).gather(2, batch["token"][:, 1:, None])[..., 0]
    is_real_BL = torch.arange(chosen_BL.shape[1]) < batch["length"][:, None] - 1
    share_BL = torch.rand(chosen_BL.shape)
    [expected] = torch.autograd.grad((chosen_BL * is_real_BL * share_BL).sum(), weight)
    patch_BPD = model.encode(batch).patch_BPD
    found = token_log_probs(model, patch_BPD, batch["token"], batch["length"])
    torch.testing.assert_close(torch.autograd.grad((found * share_BL).sum(), weight)[0], expected)


def test_teacher_forcing_gives_the_log_probabilities_of_drawing():
    model = build_model(PARTS)
    patch_BPD, _ = model.vision(build_batch()["image"])
    generation = GenerationConfig(method="top_p", top_p=1.0, max_tokens=MAX_TOKENS - 1)
    prompt_B1 = torch.full((len(patch_BPD), 1), BOS)
    drawn = decode(CaptionStep(model, patch_BPD), prompt_B1, generation, eos=EOS)
    token_NL = torch.cat([prompt_B1, drawn.token_NJT[:, 0]], dim=1)
    found = token_log_probs(model, patch_BPD, token_NL, drawn.length_NJ[:, 0] + 1)
    torch.testing.assert_close(found, drawn.log_prob_NJT[:, 0], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_rates_a_text_by_the_mean_over_its_tokens_whatever_stands_beside_it():
    batch = build_batch()

    class Rows:
        """A tokenizer of the batch's rows by number."""

        def tokenize(self, texts: list[str], max_tokens: int):
            rows = [int(text) for text in texts]
            return batch["token"][rows], batch["length"][rows]

    model, tokenizer = build_model(PARTS), Rows()
    description = PretrainedConfig(
        model=model_config(), parts=["text", "text_decoder"], transform=TransformConfig(), relevance=RelevanceConfig(),
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    subject = Pretrained(model, tokenizer, description)  # pyright: ignore[reportArgumentType]
    patch_BPD = subject.encode_patches(batch["image"])
    found = subject.caption_log_prob(patch_BPD[:1].expand(3, -1, -1), ["0", "1", "3"])
    for value, row in zip(found, [0, 1, 3], strict=True):
        length = int(batch["length"][row])
        token_NL = batch["token"][row : row + 1, :length]
        alone = token_log_probs(model, patch_BPD[:1], token_NL, torch.tensor([length]))
        torch.testing.assert_close(value, alone.mean())
