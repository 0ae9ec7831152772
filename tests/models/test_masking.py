"""Relevance of patches and their selection, against plain loops in float64."""

import math
from typing import Literal

import pytest
import torch
from builders import build_batch, build_model, vision_options
from torch import Tensor

from sycoca.models.masking import RelevanceConfig, gather_patches, is_word, num_selected, patch_relevance, select
from sycoca.models.sycoca import SyCoCa
from sycoca.types import Features


def cosine(a: Tensor, b: Tensor) -> float:
    dot, aa, bb = (sum(float(x) * float(y) for x, y in zip(u, v)) for u, v in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def expected_relevance(model: SyCoCa, features: Features, length_B: Tensor, config: RelevanceConfig) -> Tensor:
    patch, token, summary = features.patch_BPD.double(), features.token_BLD.double(), features.summary_BD.double()
    if config.space == "itc":
        image_weight, text_weight = model.image_projection.weight.double(), model.text_projection.weight.double()
        patch, token, summary = patch @ image_weight.T, token @ text_weight.T, summary @ text_weight.T
    score_BP = torch.empty(patch.shape[:2])
    for b in range(patch.shape[0]):
        compared = [] if config.words == "summary" else [token[b, place] for place in range(1, int(length_B[b]) - 1)]
        compared += [] if config.words == "tokens" else [summary[b]]
        for p in range(patch.shape[1]):
            score_BP[b, p] = max(cosine(patch[b, p], state) for state in compared)
    return score_BP


@pytest.mark.parametrize("space", ["itc", "encoder"])
@pytest.mark.parametrize("words", ["tokens", "summary", "both"])
@torch.no_grad()
def test_relevance_is_the_highest_cosine_over_the_captions_words(
    space: Literal["itc", "encoder"], words: Literal["tokens", "summary", "both"]
):
    same_width = {"vision": vision_options(embed_dim=12)} if space == "encoder" else {}
    model, batch = build_model(**same_width), build_batch()
    features, config = model.encode(batch), RelevanceConfig(space=space, words=words)
    score_BP = model.relevance(features, batch["length"], config)
    torch.testing.assert_close(score_BP, expected_relevance(model, features, batch["length"], config), rtol=0, atol=1e-5)


def test_words_are_what_stands_between_bos_and_eos():
    is_word_BL = is_word(torch.tensor([5, 2, 3]), num_tokens=6)
    assert is_word_BL.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]


def test_a_caption_without_words_scores_minus_one_everywhere():
    score_BP = patch_relevance(torch.randn(2, 6, 8), torch.randn(2, 5, 8), is_word(torch.tensor([2, 4]), num_tokens=5))
    assert (score_BP[0] == -1).all() and (score_BP[1] > -1).all()


def test_relevance_has_no_gradient():
    patch, token = (torch.randn(2, n, 8, requires_grad=True) for n in (6, 5))
    assert not patch_relevance(patch, token, is_word(torch.tensor([5, 3]), num_tokens=5)).requires_grad
    model, batch = build_model(), build_batch()
    assert not model.relevance(model.encode(batch), batch["length"], RelevanceConfig()).requires_grad


def test_relevance_is_float32_under_autocast_so_that_rounding_makes_no_ties():
    patch, token, used = torch.randn(2, 400, 8), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        score_BP = patch_relevance(patch, token, used)
    assert score_BP.dtype == torch.float32
    torch.testing.assert_close(score_BP, patch_relevance(patch, token, used))


def sorted_by_hand(scores: list[float], num: int, *, highest_first: bool) -> list[int]:
    order = sorted(range(len(scores)), key=lambda place: (-scores[place] if highest_first else scores[place], place))
    return sorted(order[:num])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_select_takes_the_share_with_the_extreme_scores(share: float, which: Literal["top", "bottom"]):
    score_BP = torch.randn(3, 8)
    chosen_BK, rest_BK = select(score_BP, share, which)
    for scores, chosen, rest in zip(score_BP.tolist(), chosen_BK.tolist(), rest_BK.tolist(), strict=True):
        assert chosen == sorted_by_hand(scores, round(8 * share), highest_first=which == "top")
        assert rest == [place for place in range(8) if place not in chosen]


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_ties_go_to_the_lower_index(which: Literal["top", "bottom"]):
    scores = [0.5, 0.1, 0.5, 0.1, 0.5, 0.1, 0.3, 0.3]
    chosen = select(torch.tensor([scores]), 0.25, which)[0][0].tolist()
    assert chosen == ([0, 2] if which == "top" else [1, 3])
    assert select(torch.zeros(1, 10_000), 0.25, which)[0][0].equal(torch.arange(2500)), "sorting must be stable at any size"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_random_selection_ignores_the_score_and_splits_the_patches(share: float):
    score_BP = torch.arange(8.0).expand(500, 8)
    chosen_BK, rest_BK = select(score_BP, share, "random")
    assert chosen_BK.shape == (500, 8 * share)
    both = torch.cat([chosen_BK, rest_BK], dim=1).sort(dim=1).values
    assert (both == torch.arange(8)).all()
    how_often_P = torch.bincount(chosen_BK.flatten(), minlength=8) / 500
    assert (how_often_P - share).abs().max() < 0.12, "every patch is as likely as any other"


def test_the_number_of_selected_patches_depends_on_the_share_alone():
    assert [num_selected(196, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 49, 98, 147, 196]
    assert [num_selected(9, share) for share in (0.25, 0.75)] == [2, 7]


def test_gather_takes_each_rows_own_patches():
    patch_BPD, index_BK = torch.randn(2, 6, 8), torch.tensor([[5, 0, 2], [1, 1, 4]])
    gathered = gather_patches(patch_BPD, index_BK)
    for b in range(2):
        for k in range(3):
            assert gathered[b, k].equal(patch_BPD[b, index_BK[b, k]])
