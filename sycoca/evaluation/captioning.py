"""Captioning as an evaluation: every rank captions its share of a test set, and the whole set is scored."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.distributed import gather_objects
from sycoca.evaluation.caption_metrics import score_captions
from sycoca.types import Captioner, DataError


class CaptionedSet(NamedTuple):
    """Predictions and references by the image's key, in the keys' order."""

    predictions: dict[str, str]
    references: dict[str, list[str]]


class CaptionEvaluator:
    """BLEU-1 to 4, ROUGE-L and CIDEr of what a captioner writes, times 100 as papers print them.

    `batches` is this rank's share: dicts with `image` (BCHW), `key` (one name an image, unique over all ranks) and `captions`
    (the references of each image); shares may be uneven or empty. The subject moves pixels to its own device and is in
    evaluation mode.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]]):
        self._batches = batches

    def __call__(self, subject: Captioner) -> dict[str, float]:
        """Scores by name and `num_images`; the same on every rank, and at every world size if the captioner writes the same
        for an image in any batch. Raises DataError as caption_batches does."""
        captioned = caption_batches(self._batches, subject.caption)
        return {**score_captions(*captioned).corpus, "num_images": float(len(captioned.predictions))}


@torch.no_grad()
def caption_batches(batches: Iterable[Mapping[str, Any]], caption: Callable[[Tensor, list[str]], list[str]]) -> CaptionedSet:
    """What `caption(image_BCHW, keys)` writes for this rank's batches, and for all ranks'; every rank gets the whole set.

    Raises DataError for an empty set, a key that occurs twice, an image without references.
    """
    own: list[tuple[str, str, list[str]]] = []
    for batch in batches:
        written = caption(batch["image"], batch["key"])
        own += zip(batch["key"], written, batch["captions"], strict=True)
    rows = sorted((row for share in gather_objects(own) for row in share), key=lambda row: row[0])
    if not rows:
        raise DataError("captioning: expected images with captions, found none; check the shards")
    for (key, _, references), following in zip(rows, [*rows[1:], None]):
        if not references:
            raise DataError(f"{key}: an image without captions; captioning needs at least one reference for each image")
        if following is not None and following[0] == key:
            raise DataError(f"{key}: two images of this name; captioning needs each image once")
    return CaptionedSet({key: text for key, text, _ in rows}, {key: references for key, _, references in rows})
