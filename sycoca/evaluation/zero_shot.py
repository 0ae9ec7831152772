"""Zero-shot classification: an image's class is the one whose averaged prompts lie nearest (CLIP, arXiv:2103.00020, 3.1.4)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sycoca.distributed import gather_uneven_rows, rank, sum_over_ranks, world_size
from sycoca.evaluation.embedding import embed_texts
from sycoca.log import logger
from sycoca.types import DataError, DualEncoder

TIE = 1e-6
"""Cosines closer than this are a tie, and ties go against the right class: constant embeddings score nothing."""


class ClassCounts(NamedTuple):
    """Over all ranks, for each class: its images, and those with the class in the first place and in the first five."""

    num_N: Tensor
    num_top1_N: Tensor
    num_top5_N: Tensor


class ZeroShotEvaluator:
    """Top-1, top-5 and mean per-class accuracy.

    `batches` is this rank's share: dicts with `image` (BCHW) and `label` (B, places in `class_names`); shares may be uneven or
    empty. The subject moves pixels to its own device and is in evaluation mode.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        class_names: Sequence[str],
        templates: Sequence[str],
        text_batch_size: int = 256,
    ):
        self._batches = batches
        self._class_names = class_names
        self._templates = templates
        self._text_batch_size = text_batch_size

    def __call__(self, subject: DualEncoder) -> dict[str, float]:
        """`top_1`, `top_5`, `mean_per_class` in percent, `num_images`; the same on every rank. Raises DataError if none."""
        return accuracy_metrics(self.count(subject))

    @torch.no_grad()
    def count(self, subject: DualEncoder) -> ClassCounts:
        """Right answers by class."""
        class_NE = embed_classes(subject, self._class_names, self._templates, batch_size=self._text_batch_size)
        if rank() == 0:
            _warn_of_ties(class_NE)
        count_3N = torch.zeros((3, len(self._class_names)), dtype=torch.int64, device=class_NE.device)
        for batch in self._batches:
            image_BE = F.normalize(subject.encode_image(batch["image"]).float(), dim=-1)
            label_B = batch["label"].to(image_BE.device)
            place_B = label_places(image_BE, class_NE, label_B)
            hit_3B = torch.stack([torch.ones_like(place_B), place_B <= 1, place_B <= 5])
            count_3N.index_add_(1, label_B, hit_3B)
        return ClassCounts(*sum_over_ranks(count_3N))


def embed_classes(subject: DualEncoder, class_names: Sequence[str], templates: Sequence[str], *, batch_size: int) -> Tensor:
    """One unit row a class: the mean of its prompts' unit embeddings, normalised. Each rank embeds a share of the classes."""
    start, end = (len(class_names) * number // world_size() for number in (rank(), rank() + 1))
    prompts = [template.replace("{}", name) for name in class_names[start:end] for template in templates]
    text_NE = embed_texts(subject, prompts, batch_size=batch_size)
    class_NE = rearrange(text_NE, "(n t) e -> n t e", t=len(templates)).mean(1)
    return gather_uneven_rows(F.normalize(class_NE, dim=-1))


def _warn_of_ties(class_NE: Tensor) -> None:
    num_apart = len(class_NE.round(decimals=5).unique(dim=0))
    if num_apart < len(class_NE):
        logger.warning(
            "distinct embeddings: %d, of %d classes; a tie counts as wrong: a name is there twice, or the tokenizer of this "
            "checkpoint does not know the names' words", num_apart, len(class_NE),
        )  # fmt: skip


def label_places(image_BE: Tensor, class_NE: Tensor, label_B: Tensor) -> Tensor:
    """B int64: the place of the right class by cosine, from 1; ties and NaN go against it."""
    score_BN = image_BE.double() @ class_NE.double().T
    is_below_BN = score_BN < score_BN.gather(1, label_B[:, None]) - TIE
    return (~is_below_BN).sum(1)  # the right class itself is not below itself, and is the 1


def accuracy_metrics(counts: ClassCounts) -> dict[str, float]:
    """Percent, and `num_images`; `mean_per_class` is over the classes that have images. Raises DataError without images."""
    num_images = int(counts.num_N.sum())
    if num_images == 0:
        raise DataError("zero-shot: expected labelled images, found none")
    has_images_N = counts.num_N > 0
    share_N = counts.num_top1_N[has_images_N].double() / counts.num_N[has_images_N]
    return {
        "top_1": 100.0 * int(counts.num_top1_N.sum()) / num_images,
        "top_5": 100.0 * int(counts.num_top5_N.sum()) / num_images,
        "mean_per_class": 100.0 * share_N.mean().item(),
        "num_images": float(num_images),
    }


def class_table(counts: ClassCounts, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`num_images` and `top_1` in percent, for each class that has images."""
    rows = zip(class_names, counts.num_N.tolist(), counts.num_top1_N.tolist(), strict=True)
    return {name: {"num_images": num, "top_1": 100.0 * hits / num} for name, num, hits in rows if num > 0}


def match_labels(labels: Sequence[str | int], class_names: Sequence[str]) -> dict[str | int, int]:
    """Each label's place in `class_names`: by number, by name (`_` for a space, any case), or by order.

    By order where no name is known and there are as many names as classes: ImageNet's folders (n01440764 ...). Raises
    DataError.
    """
    places: dict[str, int] = {_plain(name): place for place, name in enumerate(class_names)}
    numbers = {label: label for label in labels if isinstance(label, int)}
    names = [label for label in labels if isinstance(label, str)]
    unknown = [name for name in names if _plain(name) not in places]
    outside = [number for number in numbers if not 0 <= number < len(class_names)]
    if outside:
        raise DataError(
            f"label {outside[0]}: the list of classes has {len(class_names)}, numbered from 0; give the right --classes"
        )
    if unknown and len(unknown) == len(class_names) and not numbers:
        logger.info("no folder is named like a class: taking %d folders in alphabetical order as the classes", len(unknown))
        return {name: place for place, name in enumerate(sorted(unknown))}
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is not among the {len(class_names)} classes ({len(unknown)} of {len(names)} names are not); "
            "give the right --classes, or leave it out to take the names found with the images"
        )
    return {**numbers, **{name: places[_plain(name)] for name in names}}


def take_as_classes(labels: Sequence[str | int]) -> list[str]:
    """Class names from the labels found with the images. Raises DataError where they are numbers."""
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers:
        raise DataError(f"label {numbers[0]}: the images are labelled by number, which names no class; give --classes")
    return [str(label).replace("_", " ") for label in labels]


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()
