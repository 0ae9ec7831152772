"""Re-ranking against hand-made cases and a loop over all candidates, in one process and in two."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sycoca.evaluation.rerank import RerankEvaluator, reranked_places
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.types import DataError
from tests.forks import run_ranks

NUM_IMAGES, WIDTH, NUM_CANDIDATES, WEIGHT = 11, 6, 4, 0.3


class TableRater:
    """An image is its number, a text is "image caption"; how probable a text is depends on both, and is told once a pair."""

    def __init__(self) -> None:
        self.rated: list[tuple[int, str]] = []

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return torch.stack([vector_of(int(image_CHW[0, 0, 0]), 0) for image_CHW in image_BCHW])

    def encode_text(self, texts: list[str]) -> Tensor:
        pairs = [text.split() if " " in text else ("0", "1") for text in texts]
        return torch.stack([vector_of(int(image), int(caption)) for image, caption in pairs])

    def encode_patches(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.flatten(2).mT

    def caption_log_prob(self, patch_NPD: Tensor, texts: list[str]) -> Tensor:
        images = [int(patch_PD[0, 0]) for patch_PD in patch_NPD]
        self.rated += zip(images, texts, strict=True)
        return torch.tensor([log_prob_of(image, text) for image, text in zip(images, texts, strict=True)])


def vector_of(image: int, caption: int) -> Tensor:
    common_E = torch.randn(WIDTH, generator=torch.Generator().manual_seed(image))
    noise_E = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 + 10 * image + caption))
    return common_E + 0.8 * noise_E


def log_prob_of(image: int, text: str) -> float:
    owner, caption = map(int, text.split())
    noise = torch.randn((), generator=torch.Generator().manual_seed(7919 * image + 31 * owner + caption)).item()
    return -2.0 + noise + (owner == image)


def make_batches(images: list[int], batch_size: int) -> list[dict[str, Any]]:
    groups = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return [
        {
            "image": torch.tensor(group).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2),
            "key": [f"key{image:03d}" for image in group],
            "captions": [captions_of(image) for image in group],
        }
        for group in groups
    ]


def captions_of(image: int) -> list[str]:
    return [f"{image} {caption}" for caption in range(1, 2 + image % 3)]


def evaluate(batches: list[dict[str, Any]], *, num: int = NUM_CANDIDATES, weight: float = WEIGHT, chunk: int = 3):
    return RerankEvaluator(lambda: batches, num_candidates=num, weight=weight, text_batch_size=5, chunk=chunk)(TableRater())


def recall_by_loop(num: int, k: int) -> tuple[float, float]:
    """Both recalls at k after re-ranking, pair by pair in Python's own numbers."""
    texts = [text for image in range(NUM_IMAGES) for text in captions_of(image)]
    image_NE = F.normalize(TableRater().encode_image(make_batches(list(range(NUM_IMAGES)), 99)[0]["image"]), dim=-1)
    text_NE = F.normalize(TableRater().encode_text(texts), dim=-1)
    cosine = (image_NE.double() @ text_NE.double().T).tolist()

    def score(image: int, row: int) -> float:
        return cosine[image][row] + WEIGHT * log_prob_of(image, texts[row])

    def owner(row: int) -> int:
        return int(texts[row].split()[0])

    image_hits = 0
    for image in range(NUM_IMAGES):
        order = sorted(range(len(texts)), key=lambda row: -cosine[image][row])
        order = sorted(order[:num], key=lambda row: -score(image, row)) + order[num:]
        image_hits += any(owner(row) == image for row in order[:k])
    text_hits = 0
    for row in range(len(texts)):
        order = sorted(range(NUM_IMAGES), key=lambda image: -cosine[image][row])
        order = sorted(order[:num], key=lambda image: -score(image, row)) + order[num:]
        text_hits += owner(row) in order[:k]
    return 100 * image_hits / NUM_IMAGES, 100 * text_hits / len(texts)


@pytest.mark.parametrize("num", [1, NUM_CANDIDATES, 8, 100])
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_recall_equals_a_loop_over_the_candidates(num: int, chunk: int):
    metrics = evaluate(make_batches(list(range(NUM_IMAGES)), 4), num=num, chunk=chunk)
    for k in (1, 5, 10):
        expected = recall_by_loop(num, k)
        found = metrics[f"reranked/image_to_text/R@{k}"], metrics[f"reranked/text_to_image/R@{k}"]
        assert found == pytest.approx(expected)
    if num == 8:
        assert metrics["reranked/text_to_image/R@1"] > metrics["text_to_image/R@1"]


def test_what_is_not_re_ranked_is_what_the_plain_evaluator_gives():
    batches = make_batches(list(range(NUM_IMAGES)), 4)
    plain = RetrievalEvaluator(batches)(TableRater())
    for metrics in (evaluate(batches, weight=0.0), evaluate(batches, num=1)):
        assert {name: metrics[name] for name in plain} == plain
        assert {name: metrics[f"reranked/{name}"] for name in plain} == plain


def test_only_candidates_are_rated_and_each_pair_once():
    subject, batches = TableRater(), make_batches(list(range(NUM_IMAGES)), 4)
    RerankEvaluator(lambda: batches, num_candidates=2, weight=1.0, text_batch_size=3)(subject)
    num_texts = sum(len(captions_of(image)) for image in range(NUM_IMAGES))
    assert len(set(subject.rated)) == len(subject.rated)
    assert 2 * num_texts <= len(subject.rated) <= 2 * (num_texts + NUM_IMAGES)


def test_an_answer_that_is_no_candidate_keeps_its_place_and_ties_lose():
    score_NJ = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [1.0, float("nan"), 0.0]])
    is_own_NJ = torch.tensor([[False, True, True], [False, False, False], [True, False, False], [True, False, False]])
    assert reranked_places(score_NJ, is_own_NJ, torch.tensor([9, 9, 9, 9])).tolist() == [2, 9, 3, 2]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "found none"),
        (make_batches([1, 2, 1], 3), "key001: two images"),
        ([{**make_batches([1], 1)[0], "captions": [[]]}], "without captions"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(batches: list[dict[str, Any]], message: str):
    with pytest.raises(DataError, match=message):
        evaluate(batches)


@pytest.mark.slow
def test_two_processes_with_uneven_shares_give_the_numbers_of_one():
    found = run_ranks(evaluate_shares, 2)
    alone = evaluate(make_batches(list(range(NUM_IMAGES)), 4))
    assert found == [[alone] * len(UNEVEN_SHARES)] * 2


UNEVEN_SHARES = [[[0, 3, 6, 9, 4, 10, 8], [1, 2, 5, 7]], [list(range(NUM_IMAGES))[::-1], []]]


def evaluate_shares() -> list[dict[str, float]]:
    """On one rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    return [evaluate(make_batches(shares[rank], 3), chunk=2) for shares in UNEVEN_SHARES]
