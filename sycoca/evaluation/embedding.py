"""Images and captions to unit rows, gathered over all ranks: what evaluators of a dual encoder begin with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca.distributed import gather_objects, gather_uneven_rows
from sycoca.types import DataError, DualEncoder


class EmbeddedSet(NamedTuple):
    """All ranks' images and captions as unit rows; images in the order of their keys, captions in that of their images."""

    image_NE: Tensor
    text_NE: Tensor
    image_of_text_N: Tensor
    """Each caption's row of `image_NE`."""
    row_of_image: dict[str, int]
    texts: list[str]


def embed_texts(subject: DualEncoder, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """NE float32 with unit norm, on the subject's device; without texts no rows, but of the subject's width."""
    batches = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    text_NE = torch.cat([subject.encode_text(batch) for batch in batches or [["a"]]])
    return F.normalize(text_NE[: len(texts)].float(), dim=-1)


def embed_pairs(subject: DualEncoder, batches: Iterable[Mapping[str, Any]], *, text_batch_size: int) -> EmbeddedSet:
    """This rank's batches (`image` BCHW, `key`, `captions`) and all other ranks'; the same on every rank.

    Raises DataError, on every rank, for an empty set, a key that occurs twice, an image without captions.
    """
    images: list[Tensor] = []
    own: list[tuple[str, list[str]]] = []
    for batch in batches:
        images.append(F.normalize(subject.encode_image(batch["image"]).float(), dim=-1))
        own += zip(batch["key"], batch["captions"], strict=True)
    text_NE = embed_texts(subject, [text for _, texts in own for text in texts], batch_size=text_batch_size)
    image_NE = gather_uneven_rows(torch.cat(images) if images else text_NE[:0])
    text_NE = gather_uneven_rows(text_NE)
    pairs = [pair for share in gather_objects(own) for pair in share]
    order = sorted(range(len(pairs)), key=lambda row: pairs[row][0])
    _check_pairs([pairs[row] for row in order])
    count_N = torch.tensor([len(texts) for _, texts in pairs])
    places = torch.arange(len(text_NE)).split(count_N.tolist())
    device = image_NE.device
    return EmbeddedSet(
        image_NE[order],
        text_NE[torch.cat([places[row] for row in order]).to(device)],
        torch.arange(len(order)).repeat_interleave(count_N[order]).to(device),
        {pairs[row][0]: number for number, row in enumerate(order)},
        [text for row in order for text in pairs[row][1]],
    )


def _check_pairs(pairs: list[tuple[str, list[str]]]) -> None:
    if not pairs:
        raise DataError("retrieval: expected images with captions, found none; check the shards")
    for (key, texts), following in zip(pairs, [*pairs[1:], None]):
        if not texts:
            raise DataError(f"{key}: an image without captions; retrieval needs at least one for each image")
        if following is not None and following[0] == key:
            raise DataError(f"{key}: two images of this name; retrieval needs each image once")
