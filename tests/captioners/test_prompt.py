"""Prompts: what goes into them, in which order, and what gives way when they grow too long."""

from random import Random

import pytest
import torch
from pydantic import ValidationError

from sycoca.captioners.prompt import TEMPLATES, PromptConfig, Template, arrange_items, encode_prompt, pad_prompts
from sycoca.types import ConfigError

RANKED = ["a dog runs .", "a cat", "the sun", "two birds", "a red mat"]


def count_words(text: str) -> list[int]:
    """A tokenizer of words: the length of each is its id."""
    return [len(word) for word in text.split()]


def test_the_papers_prompts_are_filled_as_they_say():
    assert TEMPLATES["smallcap"].fill(RANKED[:2]) == "Similar images show\n\na dog runs\n\na cat.\n\nThis image shows "
    assert TEMPLATES["recap"].fill(RANKED[:1]) == "Similar images show\n\na dog runs.\n\nThis image shows"
    assert TEMPLATES["sitta"].fill(["dog", "grass"]) == "dog grass A picture of"
    expected = "Generate a caption containing the following words: dog, grass"
    assert TEMPLATES["sitta_instruction"].fill(["dog", "grass"]) == expected
    assert TEMPLATES["smallcap"].fill([]) == "This image shows "


def test_items_with_braces_are_put_in_as_they_are():
    assert Template(text="see {items}!", separator="; ", without_items="!").fill(["{items}", "{x}"]) == "see {items}; {x}!"


def test_rank_takes_the_first_in_order():
    assert arrange_items(RANKED, PromptConfig(num_items=3), Random(0)) == RANKED[:3]
    assert arrange_items(RANKED, PromptConfig(num_items=9), Random(0)) == RANKED


def test_permute_takes_the_first_in_every_order():
    config = PromptConfig(num_items=3, order="permute")
    orders = {tuple(arrange_items(RANKED, config, Random(seed))) for seed in range(60)}
    assert len(orders) == 6 and all(set(order) == set(RANKED[:3]) for order in orders)


def test_sample_draws_from_the_pool_alike_and_keeps_the_rank():
    config = PromptConfig(num_items=2, order="sample", pool=4)
    drawn = [arrange_items(RANKED, config, Random(seed)) for seed in range(300)]
    assert all(sorted(pair, key=RANKED.index) == pair for pair in drawn)
    counts = {item: sum(item in pair for pair in drawn) for item in RANKED}
    assert counts["a red mat"] == 0 and all(110 < counts[item] < 190 for item in RANKED[:4])
    assert arrange_items(RANKED, PromptConfig(num_items=3, order="sample", pool=3), Random(0)) == RANKED[:3]


@pytest.mark.parametrize("order", ["permute", "sample"])
def test_the_same_seed_gives_the_same_prompts(order: str):
    config = PromptConfig.model_validate({"num_items": 3, "order": order, "pool": 5 if order == "sample" else None})
    first, again = Random("seed/1"), Random("seed/1")
    chosen = [arrange_items(RANKED, config, first) for _ in range(8)]
    assert chosen == [arrange_items(RANKED, config, again) for _ in range(8)]
    assert len(set(map(tuple, chosen))) > 1, "the generator moves on"


def test_items_give_way_from_the_end_and_the_template_never_does():
    whole = count_words(TEMPLATES["smallcap"].fill(RANKED[:3]))
    for budget, kept in [(len(whole), 3), (len(whole) - 1, 2), (9, 1), (8, 0), (3, 0)]:
        ids = encode_prompt(RANKED[:3], PromptConfig(max_tokens=budget), count_words)
        assert ids == count_words(TEMPLATES["smallcap"].fill(RANKED[:kept])), budget
        assert ids[-3:] == count_words("This image shows")


def test_a_budget_below_the_template_is_an_error():
    with pytest.raises(ConfigError, match=r"prompt.max_tokens: 2; 'This image shows ' alone has 3"):
        encode_prompt(RANKED, PromptConfig(max_tokens=2), count_words)


def test_prompts_are_padded_on_the_left():
    batch = pad_prompts([[5, 6], [7], []], pad=9)
    assert batch.token_NL.tolist() == [[5, 6], [9, 7], [9, 9]]
    assert batch.is_real_NL.tolist() == [[True, True], [False, True], [False, False]]
    twice = batch.repeat(2)
    assert twice.token_NL.tolist()[:3] == [[5, 6], [5, 6], [9, 7]] and twice.is_real_NL.shape == (6, 2)
    assert pad_prompts([[], []], pad=9).token_NL.shape == (2, 0) and batch.token_NL.dtype == torch.int64


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"template": {"text": "no slot", "separator": " ", "without_items": ""}}, "expected {items} once"),
        ({"order": "sample"}, "pool belongs to order: sample"),
        ({"pool": 5}, "pool belongs to order: sample"),
        ({"order": "sample", "pool": 2, "num_items": 3}, "fewer than num_items"),
        ({"template": "clipcap"}, "template"),
    ],
)
def test_a_prompt_that_cannot_be_made_is_refused(tree: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        PromptConfig.model_validate(tree)
