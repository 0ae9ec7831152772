"""CLIP-S and RefCLIP-S by hand, and over batches."""

import pytest
import torch
from torch import Tensor

from sycoca.evaluation.clip_score import ClipScoreEvaluator
from sycoca.similarity import clip_s, ref_clip_s
from sycoca.types import DataError

DIRECTIONS = {"east": (1.0, 0.0), "north": (0.0, 3.0), "west": (-2.0, 0.0), "slope": (0.6, 0.8), "near": (4.0, 3.0)}


class Compass:
    """An image is its first two pixels, a text the direction that its last word names; lengths differ."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW[:, 0, 0, :2]

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.tensor([DIRECTIONS[text.split()[-1]] for text in texts])


def make_batches(rows: list[tuple[str, str, list[str]]], batch_size: int) -> list[dict]:
    """Rows of key, the image's direction, references."""
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [
        {
            "image": torch.tensor([DIRECTIONS[direction] for _, direction, _ in group])[:, None, None].expand(-1, 3, 4, -1),
            "key": [key for key, _, _ in group],
            "captions": [references for _, _, references in group],
        }
        for group in groups
    ]


def test_clip_s_is_the_clipped_cosine_times_two_and_a_half():
    image_NE = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    caption_NE = torch.tensor([[3.0, 4.0], [0.0, 0.1], [-1.0, 0.5]])
    assert clip_s(image_NE, caption_NE).tolist() == pytest.approx([2.5 * 0.6, 2.5, 0.0])


def test_ref_clip_s_is_the_harmonic_mean_with_the_nearest_reference():
    caption_NE = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    references = [torch.tensor([[0.0, 1.0], [3.0, 4.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([[5.0, 0.0]])]
    found = ref_clip_s(torch.tensor([1.5, 1.5, 0.0]), caption_NE, references)
    assert found.tolist() == pytest.approx([2 * 1.5 * 0.6 / 2.1, 0.0, 0.0])


def test_embeddings_in_half_precision_are_compared_in_float32():
    image_NE, caption_NE = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(clip_s(image_NE, caption_NE), clip_s(image_NE.float(), caption_NE.float()))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_evaluator_rates_each_prediction_against_its_own_image_and_references(batch_size: int):
    rows = [("b", "east", ["north", "slope"]), ("a", "slope", ["near"]), ("c", "west", ["west", "east", "north"])]
    evaluator = ClipScoreEvaluator(make_batches(rows, batch_size), text_batch_size=2)
    scores = evaluator(Compass(), {"a": "north", "b": "near", "c": "east"})
    assert list(scores.per_image) == ["a", "b", "c"]
    expected = {"a": (2.0, 0.6), "b": (2.0, 0.96), "c": (0.0, 1.0)}  # 2.5 cos with the image, cos with the nearest reference
    for key, (alone, nearest) in expected.items():
        mean = 2 * alone * nearest / (alone + nearest)
        assert scores.per_image[key] == pytest.approx({"CLIP-S": 100 * alone, "RefCLIP-S": 100 * mean}, abs=1e-4)
    assert scores.corpus["CLIP-S"] == pytest.approx(400 / 3)


def test_every_text_is_put_into_the_prompt():
    seen: list[str] = []

    class Listening(Compass):
        def encode_text(self, texts: list[str]) -> Tensor:
            seen.extend(texts)
            return super().encode_text(texts)

    ClipScoreEvaluator(make_batches([("a", "east", ["west"])], 1))(Listening(), {"a": "north"})
    assert seen == ["A photo depicts north", "A photo depicts west"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found none"),
        ([("x", "east", ["west"])], "x: CLIP-S needs a prediction"),
        ([("a", "east", [])], "a: CLIP-S needs"),
        ([("a", "east", ["west"])] * 2, "a: two images"),
    ],
)
def test_sets_that_cannot_be_rated_are_refused(rows: list, message: str):
    with pytest.raises(DataError, match=message):
        ClipScoreEvaluator(make_batches(rows, 1))(Compass(), {"a": "north"})
