"""SITTA in a world where it is known which words an image holds, over three seeds, beside controls that must fail."""

from dataclasses import replace
from statistics import median
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from toy_world import build_encoder, make_pairs, paint, toy_lm

from sycoca.captioners.aligner import fit_map
from sycoca.captioners.alignment import AlignmentConfig, fit_image_to_text
from sycoca.captioners.encoder import hash_weights
from sycoca.captioners.score import AlignedScorer, ClipScorer
from sycoca.captioners.sitta import Sitta, SittaConfig
from sycoca.captioners.sitta_maps import (
    TokenMapConfig,
    build_vocabulary,
    embed_words,
    fit_token_map,
    read_token_pairs,
    rows_of_images,
)
from sycoca.captioners.sitta_report import compare_maps, first_of_each, ndcg, token_ndcg
from sycoca.captioners.token_vocabulary import TokenVocabulary
from sycoca.captioners.transform import fit_transform
from sycoca.captioners.words import content_words
from sycoca.config import parse_config
from sycoca.types import ConfigError, DataError

NUM_TRAIN, NUM_HELD_OUT, K = 150, 60, 5


def build_sitta(choose_by: str = "CLIP-S", seed: int = 0, **changes: Any) -> Sitta:
    tree = {
        "lm": {"name": "toy"}, "prompt": {"template": "sitta", "num_items": K, "max_tokens": 20}, "num_prompts": 6,
        "generation": {"max_tokens": 6}, "choose_by": choose_by, "token_map": {"templates": ["{}"]},
    }  # fmt: skip
    config = parse_config(SittaConfig, tree | changes, source="tests")
    encoder, train = build_encoder(seed), make_pairs(build_encoder(seed), NUM_TRAIN, seed=seed)
    vocabulary = build_vocabulary(toy_lm(), train, config.token_map)
    token_map = fit_token_map(encoder, train, vocabulary, config.token_map)
    chooser = fit_image_to_text(train, AlignmentConfig()) if choose_by == "aCLIP-S" else None
    return Sitta(encoder, vocabulary, token_map, chooser, config)


@pytest.mark.parametrize("method", ["ols", "ridge", "procrustes", "robust"])
def test_words_are_found_better_by_pairs_than_by_texts_alone_and_not_at_all_by_controls(method):
    found = []
    for seed in range(3):
        encoder = build_encoder(seed)
        train, held_out = (make_pairs(encoder, num, seed=seed + num) for num in (NUM_TRAIN, NUM_HELD_OUT))
        config = TokenMapConfig(method=method, templates=["{}"], seed=seed)
        found.append(compare_maps(encoder, train, held_out, TokenVocabulary(toy_lm()), config))
    middle = {name: median(of_seed[name] for of_seed in found) for name in found[0]}
    assert middle["external"] > middle["lexical"] + 0.01 > middle["random"] + 0.15
    assert abs(middle["shuffled"] - middle["random"]) < 0.06


def test_ndcg_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    for num in (1, 4, 9):
        is_relevant_N = random.random(num) < 0.5
        is_relevant_N[random.integers(num)] = True
        gained = sum(1 / np.log2(place + 2) for place, is_good in enumerate(is_relevant_N) if is_good)
        most = sum(1 / np.log2(place + 2) for place in range(sum(is_relevant_N)))
        assert ndcg(is_relevant_N) == pytest.approx(gained / most)
    assert ndcg(np.array([True, True, False])) == 1
    assert first_of_each(np.array([4, 2, 4, 0, 2])).tolist() == [4, 2, 0]


def test_pairs_of_an_image_and_its_tokens_are_those_of_a_plain_loop():
    encoder, vocabulary = build_encoder(), TokenVocabulary(toy_lm())
    train = make_pairs(encoder, 50, seed=3)
    transform = fit_transform(["zscore"], lambda: [train.image_NE])
    rows = list(read_token_pairs(train, vocabulary, transform, order=None, is_summed=False))
    source_NE, target_NF = (torch.cat([block[side] for block in rows]) for side in (0, 1))
    expected = []
    for image, image_E in enumerate(transform(train.image_NE.double())):
        words = dict.fromkeys(word for text in train.texts[2 * image : 2 * image + 2] for word in content_words(text))
        expected += [(image_E, vocabulary.embedding_NF[vocabulary.words.index(word)].double()) for word in words]
    torch.testing.assert_close(source_NE, torch.stack([left for left, _ in expected]))
    torch.testing.assert_close(target_NF, torch.stack([right for _, right in expected]))
    sums = list(read_token_pairs(train, vocabulary, transform, order=None, is_summed=True))
    assert [block.count_N.sum().item() for block in sums] == [len(block.source_NE) for block in rows]
    torch.testing.assert_close(sum(block.target_NF.sum(0) for block in sums), target_NF.sum(0))


def test_the_robust_map_weighs_every_token_by_itself_and_the_others_need_sums_only():
    encoder, vocabulary = build_encoder(), TokenVocabulary(toy_lm())
    train = make_pairs(encoder, 50, seed=3)
    transform = fit_transform(["zscore"], lambda: [train.image_NE])
    for method, is_summed in (("robust", False), ("procrustes", True)):
        found = fit_token_map(encoder, train, vocabulary, TokenMapConfig(method=method)).weight_EF
        maps = [
            fit_map(lambda summed=summed: read_token_pairs(train, vocabulary, transform, order=None, is_summed=summed), method)
            for summed in (is_summed, not is_summed)
        ]
        torch.testing.assert_close(found, maps[0])
        assert torch.allclose(*maps) == (method == "procrustes")


def test_a_token_that_two_words_share_is_one_target_of_the_image():
    class Pieces:
        def rows_of(self, word: str) -> list[int]:
            return {"snowboard": [4, 7], "snow": [4], "surfboard": [5, 7]}[word]

    rows = rows_of_images(["snowboard in the snow", "a surfboard", "snow"], torch.tensor([0, 0, 1]), 3, Pieces())  # pyright: ignore
    assert rows == [[4, 7, 5], [4], []]


def test_the_lexical_map_reads_each_word_in_every_template_as_unit_vectors():
    encoder, vocabulary = build_encoder(), TokenVocabulary(toy_lm())
    templates = ["{}", "{} and two dogs", "grass {}"]
    mean_NE = embed_words(encoder, vocabulary, templates)
    for row in range(0, len(vocabulary.words), 5):
        units = [encoder.encode_text([template.replace("{}", vocabulary.words[row])])[0] for template in templates]
        torch.testing.assert_close(mean_NE[row], sum(unit_E / unit_E.norm() for unit_E in units) / 3)


def test_images_of_the_lexical_map_are_standardised_by_images_or_where_there_are_none_by_texts():
    encoder, vocabulary, train = build_encoder(), TokenVocabulary(toy_lm()), make_pairs(build_encoder(), 50, seed=3)
    word_NE = embed_words(encoder, vocabulary, ["{}"])
    for statistics, row_NE in (("images", train.image_NE), ("texts", word_NE)):
        config = TokenMapConfig(name="lexical", templates=["{}"], image_statistics=statistics)
        found_NE = fit_token_map(encoder, train, vocabulary, config).source_transform(row_NE.double())
        torch.testing.assert_close(found_NE, (row_NE.double() - row_NE.double().mean(0)) / row_NE.double().std(0, correction=0))


def test_targets_are_standardised_over_the_vocabulary_in_fitting_and_in_searching():
    vocabulary = TokenVocabulary(toy_lm())
    assert vocabulary.embedding_NF.mean(0).abs().max() < 1e-5
    rows = list(range(0, len(vocabulary.words), 3))
    found = vocabulary.search(vocabulary.embedding_NF[rows], 1)
    assert found == [[vocabulary.words[row]] for row in rows]
    assert build_sitta().token_map.target_transform.fingerprint == vocabulary.transform.fingerprint


def test_only_words_of_captions_are_found_where_that_is_asked_and_whitened_words_lie_apart():
    sitta = build_sitta(token_map={"templates": ["{}"], "words": "captions", "token_transform": ["whiten"]})
    train = make_pairs(sitta.encoder, NUM_TRAIN, seed=0)
    said = {word for text in train.texts for word in content_words(text)}
    assert set(sitta.vocabulary.words) == said & set(TokenVocabulary(toy_lm()).words)
    assert {word for words in sitta.retrieve(train.image_NE[:20]) for word in words} <= said
    covariance_FF = torch.cov(sitta.vocabulary.embedding_NF.T.double(), correction=0)
    value_F = torch.linalg.eigvalsh(covariance_FF)
    assert ((value_F - 1).abs() < 1e-3).logical_or(value_F.abs() < 1e-3).all() and value_F.max() > 0.5
    with pytest.raises(DataError, match="none of the language model's tokens"):
        TokenVocabulary(toy_lm(), allowed=["unheard"])


def test_words_are_clean_different_and_ranked_by_cosine():
    vocabulary = TokenVocabulary(toy_lm())
    query_BF = torch.randn(4, vocabulary.embedding_NF.shape[1])
    everything = len(vocabulary.different_words)
    for found, query_F in zip(vocabulary.search(query_BF, everything), query_BF):
        assert sorted(found) == sorted(set(found)) == sorted(vocabulary.different_words)
        assert all(word == word.strip().lower() and word for word in found)
        cosines = torch.nn.functional.cosine_similarity(query_F[None], vocabulary.embedding_NF)
        assert found[0] == vocabulary.words[cosines.argmax()] and found[-1] == vocabulary.words[cosines.argmin()]
    with pytest.raises(DataError, match="ask for fewer"):
        vocabulary.search(query_BF, everything + 1)


def test_a_word_of_two_tokens_is_found_once_and_is_spelled_as_within_a_sentence():
    class Byte:  # as byte-level tokenizers have it: 0 is the word at the start of a text, 1 behind a blank
        tokenizer: ClassVar[Any]

        def token_texts(self) -> list[str]:
            return ["dog", "dog", "cat", "."]

        def input_embeddings(self) -> torch.Tensor:
            return torch.tensor([[1.0, 0.2], [1.0, 0.1], [-1.0, 0.5], [0.0, 1.0]])

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return {"dog": [0], " dog": [1], " cat .": [2, 3]}[text]

    Byte.tokenizer = Byte()
    vocabulary = TokenVocabulary(Byte(), kinds=["none"])  # pyright: ignore
    assert vocabulary.words == ["dog", "dog", "cat"] and vocabulary.different_words == ["dog", "cat"]
    assert vocabulary.search(torch.tensor([[1.0, 0.0]]), 2) == [["dog", "cat"]]
    assert vocabulary.rows_of("dog") == [1] and vocabulary.rows_of("cat .") == [2]


@pytest.mark.parametrize("choose_by", ["CLIP-S", "aCLIP-S", "likelihood"])
def test_the_caption_is_the_candidate_that_the_scorer_rates_highest(choose_by):
    sitta = build_sitta(choose_by)
    image_NE = make_pairs(sitta.encoder, 5, seed=8).image_NE
    written = sitta.explain(paint(image_NE), ["a", "b", "c", "d", "e"])
    assert [row.caption for row in written] == sitta.caption(paint(image_NE), ["a", "b", "c", "d", "e"])
    assert [row.retrieved for row in written] == sitta.retrieve(image_NE)
    for row, image_E in zip(written, image_NE):
        assert len(row.candidates) == len(row.scores) == 6
        assert row.caption == row.candidates[int(np.argmax(row.scores))]
        if choose_by != "likelihood":
            assert sitta.chooser is not None or choose_by == "CLIP-S"
            scorer = ClipScorer(sitta.encoder) if sitta.chooser is None else AlignedScorer(sitta.encoder, sitta.chooser)
            assert row.scores == pytest.approx(scorer(image_E[None], [row.candidates])[0].tolist(), abs=1e-5)
    if choose_by != "likelihood":  # of which no word at all has most, to this language model
        assert len({row.caption for row in written}) > 1


def test_prompts_are_the_words_in_rank_order_and_then_in_random_orders():
    sitta = build_sitta(num_prompts=4)
    words = sitta.retrieve(make_pairs(sitta.encoder, 1, seed=8).image_NE)[0]
    prompts = [sitta.lm.decode_caption(ids).split() for ids in sitta._make_prompts(words, "a key")]
    assert prompts[0][:K] == words
    assert len(prompts) == 4 and all(sorted(prompt[:K]) == sorted(words) for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) > 1
    assert prompts == [sitta.lm.decode_caption(ids).split() for ids in sitta._make_prompts(words, "a key")]
    assert prompts != [sitta.lm.decode_caption(ids).split() for ids in sitta._make_prompts(words, "another")]


def test_no_graph_is_built_and_no_weight_moves():
    lm, encoder = toy_lm(), build_encoder()
    before = hash_weights(lm.model, ()), encoder.fingerprint

    def refuse(tensor: torch.Tensor) -> None:
        raise AssertionError("a graph was built")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, lambda packed: packed):
        sitta = build_sitta("aCLIP-S")
        sitta.caption(paint(make_pairs(encoder, 3, seed=1).image_NE), ["a", "b", "c"])
    assert not sitta.token_map.weight_EF.requires_grad
    assert before == (hash_weights(lm.model, ()), build_encoder().fingerprint)


def test_a_map_of_another_encoder_or_vocabulary_is_refused():
    sitta = build_sitta()
    with pytest.raises(DataError, match="do not belong together"):
        Sitta(build_encoder(3), sitta.vocabulary, sitta.token_map, None, sitta.config)
    with pytest.raises(DataError, match="aCLIP-S alone needs"):
        Sitta(sitta.encoder, sitta.vocabulary, sitta.token_map, sitta.token_map, sitta.config)
    with pytest.raises(ConfigError, match="num_prompts makes the random orders"):
        parse_config(SittaConfig, {"lm": {"name": "x"}, "prompt": {"order": "permute"}}, source="tests")
    pairs = replace(make_pairs(build_encoder(), 4, seed=1), texts=["the"] * 8)
    with pytest.raises(DataError, match="no word of the captions"):
        token_ndcg(sitta.token_map, sitta.vocabulary, pairs)
