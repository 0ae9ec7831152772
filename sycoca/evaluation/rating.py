"""Captions that are already written, rated by scorers that compare them with their images: anybody's captions, any scorers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sycoca.distributed import gather_objects
from sycoca.evaluation.caption_metrics import PERCENT, CaptionScores, mean_scores
from sycoca.types import DataError, DualEncoder


class TextScorer(Protocol):
    """Rates texts by the embedding of their image: captioners/score.py has CLIP-S, aCLIP-S and their kin."""

    @property
    def name(self) -> str:
        """What the score is called."""
        ...

    def __call__(
        self, image_BE: Tensor, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]] = (), /
    ) -> Tensor:
        """BJ of J candidates an image; more is better."""
        ...


class RatingEvaluator:
    """Scores of captions by one encoder's scorers, all in one pass over the images.

    `batches` is this rank's share, transformed as the encoder needs it: dicts with `image` (BCHW), `key` and `captions` (the
    references of each image); shares may be uneven or empty.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], scorers: Sequence[TextScorer]):
        self._batches, self._scorers = batches, scorers

    @torch.no_grad()
    def __call__(self, encoder: DualEncoder, predictions: Mapping[str, str]) -> CaptionScores:
        """Times 100, the same on every rank; the corpus's are means over images. Raises DataError for no images, an image
        without a prediction, or a key that occurs twice."""
        own: list[tuple[str, dict[str, float]]] = []
        for batch in self._batches:
            own += self._rate(encoder, batch, predictions)
        rows = sorted((row for share in gather_objects(own) for row in share), key=lambda row: row[0])
        per_image = dict(rows)
        if not rows or len(per_image) < len(rows):
            found = f"{len(rows)} images with {len(per_image)} names"
            raise DataError(f"captions are rated image by image: expected one name for each, found {found}; check the shards")
        return CaptionScores(mean_scores(per_image), per_image)

    def _rate(
        self, encoder: DualEncoder, batch: Mapping[str, Any], predictions: Mapping[str, str]
    ) -> list[tuple[str, dict[str, float]]]:
        lost = [key for key in batch["key"] if key not in predictions]
        if lost:
            raise DataError(f"{lost[0]}: an image without a caption to rate; give the captions of these shards' images")
        image_BE = encoder.encode_image(batch["image"])
        candidates = [[predictions[key]] for key in batch["key"]]
        rated = {scorer.name: scorer(image_BE, candidates, batch["captions"])[:, 0].tolist() for scorer in self._scorers}
        return [
            (key, {name: PERCENT * scores[row] for name, scores in rated.items()}) for row, key in enumerate(batch["key"])
        ]
