"""From an embedding store to an aligner of images to texts, and the spaces it is compared with on held-out pairs."""

from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sycoca.captioners.aligner import Method, PairBlock, fit_map
from sycoca.captioners.embeddings import EmbeddingStore, Pairs
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.transform import EmbeddingTransform, Kind, fit_transform
from sycoca.config import Config
from sycoca.types import DataError

Space = Literal["raw", "centred", "aligned", "shuffled"]
"""Where images are compared with texts: l2 only, centred too, by a map, or by a map of shuffled pairs, which must fail."""


class AlignmentConfig(Config):
    """How images are mapped to texts; the defaults are ReCap's."""

    method: Method = "procrustes"
    ridge: float = Field(default=1.0, gt=0)
    """Penalty of `ridge`, as scikit-learn's."""
    image_transform: list[Kind] = ["l2", "centre"]
    text_transform: list[Kind] = ["l2", "centre"]
    seed: int = 0
    """Of the shuffled pairs."""


def fit_space(train: Pairs, space: Space, config: AlignmentConfig) -> LinearAligner:
    """The aligner of the space that is named; `config` is of the two that have a map. Raises DataError without captions."""
    match space:
        case "raw":
            return join_unmapped(train, ["l2"])
        case "centred":
            return join_unmapped(train, ["l2", "centre"])
        case "aligned" | "shuffled":
            return fit_image_to_text(train, config, is_shuffled=space == "shuffled")


def fit_image_to_text(train: Pairs, config: AlignmentConfig, *, is_shuffled: bool = False) -> LinearAligner:
    """Transforms and map of the training pairs, each image with each of its captions.

    `is_shuffled` gives every image another's captions: a control, that must fail. Raises DataError without captions.
    """
    _check_captions(train)
    image_transform = fit_transform(config.image_transform, lambda: (block.image_NE for block in train.blocks()))
    text_transform = fit_transform(config.text_transform, lambda: (block.text_NE for block in train.blocks()))
    order = derange(len(train), config.seed) if is_shuffled else None
    read = partial(
        _read_pairs, train, image_transform, text_transform, order=order, is_summed=config.method != "robust"
    )
    return LinearAligner(
        weight_EF=fit_map(read, config.method, ridge=config.ridge),
        source_transform=image_transform,
        target_transform=text_transform,
        source_fingerprint=train.fingerprint,
        target_fingerprint=train.fingerprint,
        method=config.method,
        num_pairs=train.num_texts,
    )


def join_unmapped(train: Pairs, kinds: list[Kind]) -> LinearAligner:
    """Images compared with texts as they are but for these transforms: what an aligner must beat. Raises DataError."""
    _check_captions(train)
    image_transform = fit_transform(kinds, lambda: (block.image_NE for block in train.blocks()))
    return LinearAligner(
        weight_EF=torch.eye(train.image_rows([0]).shape[1], dtype=torch.float64),
        source_transform=image_transform,
        target_transform=fit_transform(kinds, lambda: (block.text_NE for block in train.blocks())),
        source_fingerprint=train.fingerprint,
        target_fingerprint=train.fingerprint,
        method="none",
        num_pairs=train.num_texts,
    )


def compare_spaces(
    train: EmbeddingStore, held_out_image_NE: Tensor, held_out_text_NE: Tensor, config: AlignmentConfig
) -> tuple[LinearAligner, dict[str, tuple[Tensor, Tensor]]]:
    """The aligner, and unit rows of held-out images and texts by name.

    One pair for each `Space`.
    """
    aligners = {name: fit_space(train, name, config) for name in get_args(Space)}
    spaces: dict[str, tuple[Tensor, Tensor]] = {}
    for name, aligner in aligners.items():
        image_NE, text_NE = aligner.apply(held_out_image_NE), aligner.embed_target(held_out_text_NE)
        spaces[name] = (F.normalize(image_NE, dim=-1), F.normalize(text_NE, dim=-1))
    return aligners["aligned"], spaces


def held_out_pairs(store: EmbeddingStore) -> tuple[Tensor, Tensor, Tensor]:
    """Captioned images, texts, and each text's row among the images. All at once: held-out sets are small. Raises DataError."""
    images, texts, owners, num_images = [], [], [], 0
    for block in store.blocks():
        images.append(block.image_NE)
        texts.append(block.text_NE)
        owners.append(block.image_of_text_N + num_images)
        num_images += len(block.keys)
    kept_N, image_of_text_N = torch.cat(owners).unique(return_inverse=True)
    if not len(kept_N):
        raise DataError(f"the split {store.split!r} has no captions to compare images with")
    return torch.cat(images)[kept_N], torch.cat(texts), image_of_text_N


def _read_pairs(
    train: Pairs, image_transform: EmbeddingTransform, text_transform: EmbeddingTransform, *,
    order: list[int] | None, is_summed: bool,
) -> Iterator[PairBlock]:  # fmt: skip
    """Pairs shard by shard, in float64; `order[i]` is the image that stands in for image i. Summed: one row an image."""
    start = 0
    for block in train.blocks():
        num = len(block.keys)
        image_NE = block.image_NE if order is None else train.image_rows(order[start : start + num])
        source_NE, target_NF = image_transform(image_NE.double()), text_transform(block.text_NE.double())
        if is_summed:
            sum_NF = target_NF.new_zeros(num, target_NF.shape[1]).index_add_(0, block.image_of_text_N, target_NF)
            yield PairBlock(source_NE, sum_NF, block.image_of_text_N.bincount(minlength=num))
        else:
            yield PairBlock(source_NE[block.image_of_text_N], target_NF)
        start += num


def _check_captions(train: Pairs) -> None:
    if not train.num_texts:
        raise DataError(f"the split {train.split!r} has no captions, and an aligner is fitted on pairs")


def derange(num: int, seed: int) -> list[int]:
    """A random cycle through all numbers: nobody keeps its own (one alone has to)."""
    cycle = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    other_N = torch.empty_like(cycle)
    other_N[cycle] = cycle.roll(1)
    return other_N.tolist()
