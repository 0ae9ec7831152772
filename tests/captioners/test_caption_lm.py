"""The language model behind its interface, against transformers itself called in the plainest way."""

from typing import Any

import pytest
import torch
from builders import shake
from tiny_lms import CAUSAL, KINDS, MAX_POSITIONS, PROMPTS, build_causal, build_lm, build_tokenizer, plain_logits, prompts
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from sycoca.captioners.lm import CaptionLM, Condition
from sycoca.captioners.lm_loading import load_lm, wrap_lm
from sycoca.captioners.prompt import pad_prompts
from sycoca.generation import GenerationConfig, decode
from sycoca.types import ConfigError

MAX_TOKENS = 7
GREEDY = GenerationConfig(max_tokens=MAX_TOKENS)
METHODS = {
    "greedy": GREEDY,
    "beam": GenerationConfig(method="beam", num_beams=3, num_return=2, max_tokens=MAX_TOKENS),
    "top_p": GenerationConfig(method="top_p", num_return=2, max_tokens=MAX_TOKENS),
}
MEMORY_WIDTH = 5


class PlainStep:
    """The step function without a cache and without padding: every row is read anew, alone, by transformers itself."""

    def __init__(self, lm: CaptionLM):
        self.lm, self.texts, self.written = lm, list(PROMPTS), [[] for _ in PROMPTS]
        self.is_begun = False

    def __call__(self, token_NT: Tensor, source_N: Tensor | None) -> Tensor:
        if source_N is not None:
            self.texts = [self.texts[row] for row in source_N.tolist()]
            self.written = [list(self.written[row]) for row in source_N.tolist()]
        if self.is_begun:
            for row, token in zip(self.written, token_NT[:, 0].tolist()):
                row.append(token)
        self.is_begun = True
        return torch.stack([plain_logits(self.lm, *row)[-1] for row in zip(self.texts, self.written)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_with_a_cache_writes_what_transformers_writes_row_by_row(kind: str, method: str):
    lm = build_lm(kind)
    generator = torch.Generator().manual_seed(3)
    cached = lm.generate(prompts(lm), METHODS[method], generator=generator)
    start = torch.zeros((len(PROMPTS), 1), dtype=torch.int64)
    plain = decode(PlainStep(lm), start, METHODS[method], eos=lm.eos, generator=torch.Generator().manual_seed(3))
    assert torch.equal(cached.token_NJT, plain.token_NJT)
    assert len({tuple(row[0]) for row in cached.token_NJT.tolist()}) > 1, "the captions depend on the prompt"
    torch.testing.assert_close(cached.log_prob_NJT, plain.log_prob_NJT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_captions_are_those_of_transformers_own_generate(kind: str):
    lm = build_lm(kind)
    model: Any = lm.model
    written = lm.generate(prompts(lm), GREEDY)
    for row, text in zip(written.token_NJT[:, 0], PROMPTS):
        ids = torch.tensor([lm.encode_prompt(text)])
        options = {"max_new_tokens": MAX_TOKENS, "do_sample": False, "num_beams": 1, "pad_token_id": lm.pad}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        theirs = whole[1:] if model.config.is_encoder_decoder else whole[ids.shape[1] :]
        assert row.tolist()[: len(theirs)] == theirs.tolist()


@pytest.mark.parametrize(("kind", "is_open"), [("gpt2", True), ("t5", False)])
def test_a_causal_model_s_prompt_stays_open_where_the_tokenizer_ends_every_text(kind: str, is_open: bool):
    lm = build_lm(kind)
    bos, *words = lm.encode_prompt("a dog")
    assert lm.tokenizer.decode(words) == "a dog" and bos == lm.tokenizer.bos_token_id
    ends = [("[BOS]", bos), ("[EOS]", lm.eos)]
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    assert lm.encode_prompt("a dog") == ([bos, *words] if is_open else [bos, *words, lm.eos])


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy_search(kind: str):
    lm = build_lm(kind)
    beam = lm.generate(prompts(lm), GenerationConfig(method="beam", num_beams=1, max_tokens=MAX_TOKENS))
    assert torch.equal(beam.token_NJT, lm.generate(prompts(lm), GREEDY).token_NJT)


def with_image(lm: CaptionLM, num: int, *, seed: int = 5) -> Condition:
    """A prefix for any model; memory too for those that have adapters, whose zero output is moved off zero."""
    generator = torch.Generator().manual_seed(seed)
    prefix_NQD = torch.randn(num, 3, lm.width, generator=generator)
    if lm.adapters is None:
        return Condition(prefix_NQD=prefix_NQD)
    return Condition(prefix_NQD=prefix_NQD, memory_NMF=torch.randn(num, 4, MEMORY_WIDTH, generator=generator))


def take_row(condition: Condition, row: int) -> Condition:
    memory, prefix = condition.memory_NMF, condition.prefix_NQD
    return Condition(
        prefix_NQD=None if prefix is None else prefix[row : row + 1],
        memory_NMF=None if memory is None else memory[row : row + 1],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_prefix_and_memory_is_written_alone_as_in_its_batch(kind: str):
    lm = build_lm(kind)
    if kind in CAUSAL:
        shake(lm.add_adapters(MEMORY_WIDTH, reduction=2), std=0.5)
    lm.eval()
    condition = with_image(lm, len(PROMPTS))
    for config in METHODS.values():
        if config.method == "top_p":
            continue  # one row draws other random numbers than the same row of three
        whole = lm.generate(prompts(lm), config, condition)
        for row, text in enumerate(PROMPTS):
            alone = lm.generate(prompts(lm, (text,)), config, take_row(condition, row))
            num = alone.token_NJT.shape[-1]
            assert torch.equal(alone.token_NJT[0], whole.token_NJT[row, :, :num])
            torch.testing.assert_close(alone.score_NJ[0], whole.score_NJ[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_captions_are_those_of_a_plain_loop_and_of_decoding(kind: str):
    lm = build_lm(kind)
    rows = [lm.encode_caption(text, max_tokens=6) for text in ("cats sit", "the dog runs in the sun .", "")]
    assert [len(row) for row in rows] == [3, 6, 1] and all(row[-1] == lm.eos for row in rows)
    token_NT, length_N = lm.pad_captions(rows)
    log_prob_NT = lm.log_probs(prompts(lm), token_NT, length_N)
    for number, (text, row) in enumerate(zip(PROMPTS, rows)):
        logits = plain_logits(lm, text, row[:-1])
        expected = [logits[place].log_softmax(-1)[token].item() for place, token in enumerate(row)]
        assert log_prob_NT[number, : len(row)].tolist() == pytest.approx(expected, abs=1e-4)
        assert not log_prob_NT[number, len(row) :].any()
    drawn = lm.generate(prompts(lm), METHODS["top_p"], generator=torch.Generator().manual_seed(1))
    again = lm.log_probs(prompts(lm).repeat(2), drawn.token_NJT.flatten(0, 1), drawn.length_NJ.flatten())
    torch.testing.assert_close(again.view_as(drawn.log_prob_NJT), drawn.log_prob_NJT, atol=1e-4, rtol=1e-4)


def test_log_probabilities_with_prefix_and_memory_are_those_of_decoding():
    lm = build_lm()
    shake(lm.add_adapters(MEMORY_WIDTH, reduction=2), std=0.5)
    lm.eval()
    condition = with_image(lm, len(PROMPTS))
    greedy = lm.generate(prompts(lm), GREEDY, condition)
    again = lm.log_probs(prompts(lm), greedy.token_NJT[:, 0], greedy.length_NJ[:, 0], condition)
    torch.testing.assert_close(again, greedy.log_prob_NJT[:, 0], atol=1e-4, rtol=1e-4)


def test_a_prefix_alone_is_prompt_enough():
    lm = build_lm()
    condition = with_image(lm, 2)
    written = lm.generate(pad_prompts([[], []], lm.pad), GREEDY, condition)
    model: Any = lm.model
    assert condition.prefix_NQD is not None
    first = model(inputs_embeds=condition.prefix_NQD).logits[:, -1].argmax(-1)
    assert torch.equal(written.token_NJT[:, 0, 0], first)
    beam = GenerationConfig(method="beam", num_beams=1, max_tokens=GREEDY.max_tokens)
    searched = lm.generate(pad_prompts([[], []], lm.pad), beam, condition)
    assert torch.equal(searched.token_NJT, written.token_NJT)


def test_stop_texts_end_a_caption_with_the_probability_of_all_ends_together():
    plain, lm = build_lm(), build_lm(stops=(".", "\n"))
    stops = [lm.eos, *lm.tokenizer.encode(".\n", add_special_tokens=False)]
    step, start_NT = lm.start(prompts(lm), max_tokens=1)
    prob_NV = step(start_NT, None).softmax(-1)
    plain_step, _ = plain.start(prompts(plain), max_tokens=1)
    plain_NV = plain_step(start_NT, None).softmax(-1)
    torch.testing.assert_close(prob_NV[:, lm.eos], plain_NV[:, stops].sum(-1))
    assert not prob_NV[:, stops[1:]].any()
    others = [token for token in range(prob_NV.shape[1]) if token not in stops]
    torch.testing.assert_close(prob_NV[:, others], plain_NV[:, others])
    assert lm.encode_caption("a dog . the", max_tokens=9) == [*lm.tokenizer.encode("a dog", add_special_tokens=False), lm.eos]


def test_every_row_of_the_vocabulary_has_its_clean_text():
    lm = build_lm()
    texts = lm.token_texts()
    assert len(texts) == lm.input_embeddings().shape[0] == len(lm.tokenizer) + 2
    assert texts[:4] == ["", "", "", ""] and texts[-2:] == ["", ""], "special tokens and unknown rows"
    assert texts[lm.tokenizer.convert_tokens_to_ids("\n")] == ""
    assert {"dog", "cats", "."} <= set(texts)
    assert not lm.input_embeddings().requires_grad


def test_a_caption_is_read_up_to_its_end():
    lm = build_lm()
    dog, runs = lm.tokenizer.encode("dog runs", add_special_tokens=False)
    assert lm.decode_caption([dog, runs, lm.eos, dog]) == "dog runs"
    assert lm.decode_caption([lm.eos]) == ""


def test_nothing_of_a_loaded_model_trains_or_drops_out():
    lm = build_lm().train()
    assert lm.trained() == {} and not lm.model.training
    lm.model.requires_grad_(True)
    assert lm.train().model.training and lm.trained()


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_saved_folder_is_loaded_as_what_it_is(kind: str, tmp_path):
    lm = build_lm(kind)
    model: Any = lm.model
    model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_lm(tmp_path)
    assert torch.equal(loaded.generate(prompts(lm), GREEDY).token_NJT, lm.generate(prompts(lm), GREEDY).token_NJT)
    assert load_lm(tmp_path, dtype=torch.bfloat16).input_embeddings().dtype == torch.bfloat16


def test_a_causal_model_without_a_pad_token_is_padded_with_eos_and_writes_the_same():
    lm = build_lm()
    unpadded = wrap_lm(lm.model, build_tokenizer(pad_token=None))
    assert unpadded.pad == lm.eos
    assert torch.equal(unpadded.generate(prompts(unpadded), GREEDY).token_NJT, lm.generate(prompts(lm), GREEDY).token_NJT)


def test_what_cannot_be_a_captioner_s_language_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no eos token"):
        wrap_lm(build_causal("gpt2"), build_tokenizer(eos_token=None))
    with pytest.raises(ConfigError, match="no pad token"):
        wrap_lm(build_lm("t5").model, build_tokenizer(pad_token=None))
    with pytest.raises(ConfigError, match="take the model's own"):
        wrap_lm(build_causal("gpt2", num_extra=-1), build_tokenizer())
    with pytest.raises(ConfigError, match="one known token"):
        build_lm(stops=("a dog",))
    with pytest.raises(ConfigError, match="one known token"):
        build_lm(stops=("giraffe",))
    with pytest.raises(ConfigError, match="expected a folder with a transformers model"):
        load_lm(tmp_path / "nowhere")
    lm = build_lm()
    with pytest.raises(ConfigError, match=rf"reads {MAX_POSITIONS} tokens at most"):
        lm.generate(prompts(lm), GenerationConfig(max_tokens=MAX_POSITIONS))
