"""Decoding against brute force: a table gives the next token's logits from the last two tokens."""

from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sycoca.generation import Generated, GenerationConfig, decode

EOS, NUM_TOKENS, MAX_TOKENS = 2, 4, 4


class TableModel:
    """No cache but its own token history, which `source_N` reorders: what any cached step must be equal to."""

    def __init__(self, table_VVV: Tensor):
        self.table_VVV = table_VVV
        self.num_calls = 0

    def __call__(self, token_NT: Tensor, source_N: Tensor | None) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 1:
            self.history_NT = token_NT
        else:
            kept_NT = self.history_NT if source_N is None else self.history_NT[source_N]
            self.history_NT = torch.cat([kept_NT, token_NT], 1)
        return self.table_VVV[self.history_NT[:, -2], self.history_NT[:, -1]]


def make_table(seed: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(num_tokens, num_tokens, num_tokens, generator=generator)


PROMPT = torch.tensor([[0, 1, 3], [3, 0, 0], [1, 1, 0]])


def run(table_VVV: Tensor, prompt_NT: Tensor = PROMPT, **settings) -> Generated:
    settings = {"max_tokens": MAX_TOKENS, **settings}
    generator = torch.Generator().manual_seed(7)
    return decode(TableModel(table_VVV), prompt_NT, GenerationConfig(**settings), eos=EOS, generator=generator)


def log_probs_of(table_VVV: Tensor, prompt: list[int], tokens: list[int]) -> list[float]:
    history, found = list(prompt), []
    for token in tokens:
        found.append(float(table_VVV[history[-2], history[-1]].log_softmax(-1)[token]))
        history.append(token)
    return found


def tokens_of(generated: Generated, row: int, candidate: int = 0) -> list[int]:
    length = int(generated.length_NJ[row, candidate])
    return generated.token_NJT[row, candidate, :length].tolist()


def all_captions(num_tokens: int, max_tokens: int) -> list[list[int]]:
    return [
        list(tokens)
        for length in range(1, max_tokens + 1)
        for tokens in product(range(num_tokens), repeat=length)
        if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == max_tokens)
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beam_search_equals_an_exhaustive_search(seed: int, length_penalty: float):
    table_VVV = make_table(seed)
    generated = run(table_VVV, method="beam", num_beams=128, num_return=5, length_penalty=length_penalty)
    for row, prompt in enumerate(PROMPT.tolist()):
        scored = [
            (sum(log_probs_of(table_VVV, prompt, tokens)) / len(tokens) ** length_penalty, tokens)
            for tokens in all_captions(NUM_TOKENS, MAX_TOKENS)
        ]
        for candidate, (score, tokens) in enumerate(sorted(scored, reverse=True)[:5]):
            assert tokens_of(generated, row, candidate) == tokens
            assert generated.score_NJ[row, candidate].item() == pytest.approx(score, abs=1e-5)


def test_greedy_equals_a_for_loop():
    table_VVV = make_table(3)
    generated = run(table_VVV, max_tokens=9)
    for row, prompt in enumerate(PROMPT.tolist()):
        history = list(prompt)
        while len(history) < len(prompt) + 9 and EOS not in history[len(prompt) :]:
            history.append(int(table_VVV[history[-2], history[-1]].argmax()))
        assert tokens_of(generated, row) == history[len(prompt) :]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_one_beam_equals_greedy_search(seed: int, length_penalty: float):
    table_VVV = make_table(seed, num_tokens=5)
    settings = {"length_penalty": length_penalty, "max_tokens": 7, "no_repeat_ngram": 2}
    greedy = run(table_VVV, **settings)
    beam = run(table_VVV, method="beam", num_beams=1, **settings)
    assert torch.equal(greedy.token_NJT, beam.token_NJT)
    assert torch.equal(greedy.length_NJ, beam.length_NJ)
    torch.testing.assert_close(greedy.log_prob_NJT, beam.log_prob_NJT)
    torch.testing.assert_close(greedy.score_NJ, beam.score_NJ)


def narrow_beam_by_hand(table_VVV: Tensor, prompt: list[int], num_beams: int) -> list[tuple[float, list[int]]]:
    live, pool = [(0.0, [])], []
    for _ in range(MAX_TOKENS):
        grown = [
            (score + log_probs_of(table_VVV, prompt, [*tokens, token])[-1], [*tokens, token])
            for score, tokens in live
            for token in range(NUM_TOKENS)
        ]
        grown = sorted(grown, reverse=True)
        pool += [(score / len(tokens), tokens) for score, tokens in grown[:num_beams] if tokens[-1] == EOS]
        pool = sorted(pool, reverse=True)[:num_beams]
        live = [(score, tokens) for score, tokens in grown if tokens[-1] != EOS][:num_beams]
        if len(pool) == num_beams and live[0][0] / len(live[0][1]) <= pool[-1][0]:
            return pool
    return sorted(pool + [(score / len(tokens), tokens) for score, tokens in live], reverse=True)[:num_beams]


@pytest.mark.parametrize("seed", range(4))
def test_narrow_beam_search_equals_beam_search_over_lists(seed: int):
    table_VVV = make_table(seed)
    generated = run(table_VVV, method="beam", num_beams=3, num_return=3)
    for row, prompt in enumerate(PROMPT.tolist()):
        expected = narrow_beam_by_hand(table_VVV, prompt, 3)
        assert [tokens_of(generated, row, candidate) for candidate in range(3)] == [tokens for _, tokens in expected]
        assert generated.score_NJ[row].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_short_captions_that_finish_first_do_not_shut_out_a_better_long_one():
    """The right caption is 3 1 1 0 eos, almost certain at every step; at each step eos is the second choice."""
    table_VVV = torch.full((NUM_TOKENS, NUM_TOKENS, NUM_TOKENS), -20.0)
    table_VVV[..., EOS] = -4.0
    right = [0, 0, 3, 1, 1, 0, EOS]
    for place in range(2, 7):
        table_VVV[right[place - 2], right[place - 1], right[place]] = 4.0
    generated = run(table_VVV, torch.tensor([right[:2]]), method="beam", num_beams=2, max_tokens=8)
    assert tokens_of(generated, 0) == right[2:]


def test_sampling_draws_from_the_renormalised_nucleus():
    prob_V = torch.tensor([0.15, 0.4, 0.25, 0.12, 0.08])
    table_VVV = prob_V.log().expand(5, 5, 5)
    prompt_NT = torch.zeros(20_000, 2, dtype=torch.int64)
    generated = run(table_VVV, prompt_NT, method="top_p", top_p=0.7, max_tokens=1)
    share_V = torch.bincount(generated.token_NJT.flatten(), minlength=5) / 20_000
    nucleus_V = torch.tensor([0.15, 0.4, 0.25, 0.0, 0.0]) / 0.8
    assert share_V[3:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(share_V, nucleus_V, atol=0.015, rtol=0)


def test_temperature_sharpens_before_the_nucleus_is_cut():
    prob_V = torch.tensor([0.2, 0.5, 0.3])
    prompt_NT = torch.zeros(20_000, 2, dtype=torch.int64)
    generated = run(prob_V.log().expand(3, 3, 3), prompt_NT, method="top_p", top_p=1.0, temperature=0.5, max_tokens=1)
    share_V = torch.bincount(generated.token_NJT.flatten(), minlength=3) / 20_000
    torch.testing.assert_close(share_V, prob_V.square() / prob_V.square().sum(), atol=0.015, rtol=0)


def test_equal_seeds_draw_equal_captions_and_candidates_differ():
    settings = {"method": "top_p", "top_p": 1.0, "num_return": 6, "max_tokens": 8}
    first, second = run(make_table(1), **settings), run(make_table(1), **settings)
    assert torch.equal(first.token_NJT, second.token_NJT)
    assert first.token_NJT.shape[:2] == (3, 6)
    assert len({tuple(tokens) for tokens in first.token_NJT[0].tolist()}) > 1


@pytest.mark.parametrize(
    "settings",
    [{"method": "greedy"}, {"method": "beam", "num_beams": 4, "num_return": 3}, {"method": "top_p", "num_return": 3}],
)
def test_log_probs_are_the_models_own_whatever_shaped_the_choice(settings: dict):
    table_VVV = make_table(5)
    generated = run(
        table_VVV, **settings, repetition_penalty=1.7, no_repeat_ngram=2, min_tokens=2, temperature=0.7, max_tokens=6
    )
    for row, prompt in enumerate(PROMPT.tolist()):
        for candidate in range(generated.length_NJ.shape[1]):
            tokens = tokens_of(generated, row, candidate)
            expected = log_probs_of(table_VVV, prompt, tokens)
            found = generated.log_prob_NJT[row, candidate]
            assert found[: len(tokens)].tolist() == pytest.approx(expected, abs=1e-5)
            assert not found[len(tokens) :].any()
            assert (generated.token_NJT[row, candidate, len(tokens) :] == EOS).all()


@pytest.mark.parametrize("settings", [{"method": "greedy"}, {"method": "beam", "num_beams": 3, "num_return": 2}])
@pytest.mark.parametrize("seed", range(4))
def test_rows_do_not_depend_on_their_neighbours(settings: dict, seed: int):
    table_VVV = make_table(seed)
    together = run(table_VVV, **settings, max_tokens=8)
    for row in range(3):
        alone = run(table_VVV, PROMPT[row : row + 1], **settings, max_tokens=8)
        torch.testing.assert_close(together.score_NJ[row], alone.score_NJ[0])
        for candidate in range(alone.length_NJ.shape[1]):
            assert tokens_of(together, row, candidate) == tokens_of(alone, 0, candidate)


@pytest.mark.parametrize("method", ["greedy", "beam", "top_p"])
def test_no_eos_before_the_least_length(method: str):
    table_VVV = make_table(0)
    table_VVV[..., EOS] += 9.0
    assert run(table_VVV, method=method).length_NJ.eq(1).all()
    assert run(table_VVV, method=method, min_tokens=3).length_NJ.eq(4).all()


@pytest.mark.parametrize("method", ["greedy", "beam", "top_p"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_occurs_twice(method: str, size: int):
    table_VVV = make_table(2, num_tokens=7)
    table_VVV[..., EOS] -= 3.0
    settings = {"method": method, "max_tokens": 12, "num_beams": 3}

    def num_repeats(generated: Generated) -> int:
        rows = [tokens_of(generated, row) for row in range(3)]
        ngrams = [[tuple(row[i : i + size]) for i in range(len(row) - size + 1)] for row in rows]
        return sum(len(found) - len(set(found)) for found in ngrams)

    assert num_repeats(run(table_VVV, **settings)) > 0
    assert num_repeats(run(table_VVV, **settings, no_repeat_ngram=size)) == 0


def test_repetition_penalty_multiplies_the_log_probability_of_new_tokens_only():
    log_prob_V = torch.tensor([0.5, 0.3, 0.2]).log()  # the prompt's zeros are not new: 0 comes first all the same
    prompt_NT = torch.zeros(1, 2, dtype=torch.int64)
    settings = {"max_tokens": 3, "min_tokens": 3}
    just_enough = float(log_prob_V[1] / log_prob_V[0])
    weaker = run(log_prob_V.expand(3, 3, 3), prompt_NT, repetition_penalty=just_enough - 0.01, **settings)
    stronger = run(log_prob_V.expand(3, 3, 3), prompt_NT, repetition_penalty=just_enough + 0.01, **settings)
    assert weaker.token_NJT.tolist() == [[[0, 0, 0]]]
    assert stronger.token_NJT.tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("method", ["greedy", "beam", "top_p"])
def test_without_early_stop_the_model_is_called_exactly_max_tokens_times(method: str):
    table_VVV = make_table(0)
    table_VVV[..., EOS] += 9.0
    for stop_early in (True, False):
        model = TableModel(table_VVV)
        config = GenerationConfig(method=method, num_beams=1, max_tokens=6, stop_early=stop_early)
        generated = decode(model, PROMPT, config, eos=EOS)
        assert model.num_calls == generated.token_NJT.shape[2] == (1 if stop_early else 6)
        assert generated.length_NJ.eq(1).all()


def test_beams_that_cannot_exist_score_minus_infinity():
    generated = run(make_table(0), method="beam", num_beams=8, num_return=8, max_tokens=1)
    assert generated.score_NJ.isfinite().sum(1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_return": 2}, "greedy search gives one candidate"),
        ({"method": "beam", "num_beams": 2, "num_return": 3}, "more than num_beams"),
        ({"min_tokens": 5, "max_tokens": 4}, "more than max_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        GenerationConfig(**settings)
