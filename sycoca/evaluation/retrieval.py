"""Image-to-text and text-to-image retrieval by cosine, over every caption of every image of a test set.

The protocol of Karpathy's splits (COCO, Flickr30k: five captions an image): an image is found at the best place of any of
its captions, a caption at the place of its image.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sycoca.distributed import rank, sum_over_ranks, world_size
from sycoca.evaluation.embedding import embed_pairs
from sycoca.types import DualEncoder

RECALL_AT = (1, 5, 10)
TIE = 1e-6
"""Cosines closer than this are a tie: what float32 encoders give one caption in two batches differs by up to about that."""


class Ranks(NamedTuple):
    """Places of the right answers, from 1; int64."""

    image_to_text_N: Tensor
    """For each image, the place of its best caption among all captions."""
    text_to_image_N: Tensor
    """For each caption, the place of its image among all images."""


class RetrievalEvaluator:
    """Recall at 1, 5 and 10 and the places' mean and median, both ways.

    `batches` is this rank's share: dicts with `image` (BCHW), `key` (one name an image, unique over all ranks) and
    `captions` (a list for each image); shares may be uneven or empty. The subject moves pixels to its own device and is in
    evaluation mode. `chunk` rows of similarities are held at a time.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, text_batch_size: int = 256, chunk: int = 128):
        self._batches = batches
        self._text_batch_size = text_batch_size
        self._chunk = chunk

    @torch.no_grad()
    def __call__(self, subject: DualEncoder) -> dict[str, float]:
        """Percent and places by name; the same on every rank, and at every world size if the encoder gives a row the same
        embedding in any batch. Raises DataError for an empty set, a key that occurs twice, an image without captions."""
        known = embed_pairs(subject, self._batches, text_batch_size=self._text_batch_size)
        return recall_metrics(retrieval_ranks(known.image_NE, known.text_NE, known.image_of_text_N, chunk=self._chunk))


def retrieval_ranks(image_NE: Tensor, text_NE: Tensor, image_of_text_N: Tensor, *, chunk: int) -> Ranks:
    """Places by inner product; `image_of_text_N` is each text's row of `image_NE`, and every image has a text.

    Ties go against the right answer, and so does NaN: constant or broken embeddings come last. Similarities are float64, so
    that neither the chunk's size nor the number of ranks shows. Each rank takes every world-size'th chunk; all ranks must
    call this with the same rows, and all get the whole result.
    """
    image_NE, text_NE = image_NE.double(), text_NE.double()
    device = image_NE.device
    image_to_text_N = torch.zeros(len(image_NE), dtype=torch.int64, device=device)
    text_to_image_N = torch.zeros(len(text_NE), dtype=torch.int64, device=device)
    for rows_N in _own_chunks(len(image_NE), chunk, device):
        is_own_NN = rows_N[:, None] == image_of_text_N
        image_to_text_N[rows_N] = _places_of_best(image_NE[rows_N] @ text_NE.T, is_own_NN)
    for rows_N in _own_chunks(len(text_NE), chunk, device):
        is_own_NN = image_of_text_N[rows_N, None] == torch.arange(len(image_NE), device=device)
        text_to_image_N[rows_N] = _places_of_best(text_NE[rows_N] @ image_NE.T, is_own_NN)
    return Ranks(sum_over_ranks(image_to_text_N), sum_over_ranks(text_to_image_N))


def recall_metrics(ranks: Ranks) -> dict[str, float]:
    """`image_to_text/R@1` and so on in percent, mean and median places, `mean_recall` over the six recalls,
    `num_images` and `num_captions`.
    """
    metrics = {"num_images": float(len(ranks.image_to_text_N)), "num_captions": float(len(ranks.text_to_image_N))}
    for direction, place_N in (("image_to_text", ranks.image_to_text_N), ("text_to_image", ranks.text_to_image_N)):
        for k in RECALL_AT:
            metrics[f"{direction}/R@{k}"] = 100.0 * (place_N <= k).double().mean().item()
        metrics[f"{direction}/mean_rank"] = place_N.double().mean().item()
        metrics[f"{direction}/median_rank"] = float(np.median(place_N.cpu().numpy()))
    recalls = [value for name, value in metrics.items() if "/R@" in name]
    return {**metrics, "mean_recall": sum(recalls) / len(recalls)}


def _own_chunks(num_rows: int, chunk: int, device: torch.device) -> Iterator[Tensor]:
    """Row numbers of the chunks that are this rank's."""
    for start in range(rank() * chunk, num_rows, world_size() * chunk):
        yield torch.arange(start, min(start + chunk, num_rows), device=device)


def _places_of_best(score_NN: Tensor, is_own_NN: Tensor) -> Tensor:
    """For each row, the place of its best own column: one more than the others' columns that are not clearly below it."""
    best_N1 = score_NN.masked_fill(~is_own_NN, -torch.inf).amax(1, keepdim=True)
    is_below_NN = score_NN < best_N1 - TIE  # never true of NaN
    return 1 + (~is_below_NN & ~is_own_NN).sum(1)
