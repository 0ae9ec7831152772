"""Captioning a test set and scoring it, in one process and in two."""


import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sycoca.evaluation.caption_metrics import score_captions
from sycoca.evaluation.captioning import CaptionEvaluator, caption_batches
from sycoca.evaluation.clip_score import ClipScoreEvaluator
from sycoca.types import DataError
from tests.forks import run_ranks

NUM_IMAGES = 11
THINGS = ["red dog", "blue cat", "green bus", "old tree"]


class Namer:
    """An image is its number, which says what it shows; every third caption is wrong."""

    def caption(self, image_BCHW: Tensor, keys: list[str]) -> list[str]:
        numbers = image_BCHW[:, 0, 0, 0].int().tolist()
        assert keys == [f"key{number:03d}" for number in numbers]
        return [f"A {THINGS[(number + (number % 3 == 0)) % 4]} stands here." for number in numbers]

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW[:, 0, 0] + 1

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(len(text)), float(ord(text[-5]))] for text in texts])


def references_of(number: int) -> list[str]:
    return [f"a {THINGS[number % 4]} stands on road {number}", f"There is a {THINGS[number % 4]}."][: 1 + number % 2]


def make_batches(images: list[int], batch_size: int = 4) -> list[dict]:
    groups = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return [
        {
            "image": torch.tensor(group).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2),
            "key": [f"key{number:03d}" for number in group],
            "captions": [references_of(number) for number in group],
        }
        for group in groups
    ]


def evaluate(images: list[int], batch_size: int) -> dict:
    batches = make_batches(images, batch_size)
    captions = caption_batches(batches, Namer().caption)
    clip = ClipScoreEvaluator(batches)(Namer(), captions.predictions)
    return {"scores": CaptionEvaluator(batches)(Namer()), "captions": captions, "clip": clip.corpus, "each": clip.per_image}


def test_the_evaluator_scores_what_the_captioner_wrote():
    found = evaluate(list(range(NUM_IMAGES)), 4)
    images = torch.arange(NUM_IMAGES).reshape(-1, 1, 1, 1)
    predictions = dict(zip(keys := [f"key{number:03d}" for number in range(NUM_IMAGES)], Namer().caption(images, keys)))
    references = {key: references_of(number) for number, key in enumerate(keys)}
    assert found["captions"] == (predictions, references)
    assert found["scores"] == {**score_captions(predictions, references).corpus, "num_images": NUM_IMAGES}
    assert 20 < found["scores"]["BLEU-1"] < 90


def test_the_batches_never_change_a_score():
    images = list(range(NUM_IMAGES))
    assert evaluate(images, 4) == evaluate(images[::-1], 3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "found none"),
        (make_batches([1, 2, 1], 3), "key001: two images"),
        ([{**make_batches([1], 1)[0], "captions": [[]]}], "key001: an image without captions"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(batches: list[dict], message: str):
    with pytest.raises(DataError, match=message):
        CaptionEvaluator(batches)(Namer())


@pytest.mark.slow
def test_two_processes_with_uneven_shares_give_the_numbers_of_one():
    found = run_ranks(evaluate_shares, 2)
    alone = evaluate(list(range(NUM_IMAGES)), 4)
    assert found == [[*[alone] * len(UNEVEN_SHARES), "key001: two images of this name; captioning needs each image once"]] * 2


UNEVEN_SHARES = [[[0, 3, 6, 9, 4, 10, 8], [1, 2, 5, 7]], [list(range(NUM_IMAGES))[::-1], []]]


def evaluate_shares() -> list:
    """On one rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: list = [evaluate(shares[rank], 3) for shares in UNEVEN_SHARES]
    try:
        CaptionEvaluator(make_batches([1, 2 + rank]))(Namer())
    except DataError as error:
        found.append(str(error))
    return found
