"""Rows of a datastore: texts with where they come from, and the embeddings that one encoder gave them."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sycoca.captioners.transform import EmbeddingTransform
from sycoca.types import DataError

Origin = Literal["human", "synthetic"]
TRAIN_SPLITS = ("train", "restval")
"""Karpathy's restval is trained on. Rows of any other split would let a captioner copy what it is tested on."""


class Row(NamedTuple):
    """What is known of one text."""

    text: str
    source: str
    """The image it was written for (`source_of` a sample's key); empty where there is none."""
    split: str = "train"
    origin: Origin = "human"
    score: float = float("nan")
    """How good a scorer found it; NaN where none has looked."""


@dataclass(frozen=True)
class TextRows:
    """Rows with their embeddings."""

    rows: list[Row]
    embedding_SE: NDArray[np.float32]
    fingerprint: str
    """Of the encoder."""


def admit_rows(contents: TextRows, transform: EmbeddingTransform, *, allow_held_out: bool) -> TextRows:
    """The rows with their embeddings transformed. Raises DataError for held-out splits unless they are allowed, for embeddings
    that are not finite, and where there is not one for each row."""
    if len(contents.rows) != len(contents.embedding_SE):
        raise DataError(f"{len(contents.rows)} rows with {len(contents.embedding_SE)} embeddings: expected one for each")
    held_out = sorted({row.split for row in contents.rows} - set(TRAIN_SPLITS))
    if held_out and not allow_held_out:
        raise DataError(
            f"rows of the split {', '.join(held_out)}: a captioner could copy what it is tested on. Take training rows "
            f"({', '.join(TRAIN_SPLITS)}), or allow held-out ones if you mean it (--allow-held-out)"
        )
    embedding_SE = transform(torch.from_numpy(np.array(contents.embedding_SE, dtype=np.float32))).numpy()
    if not np.isfinite(embedding_SE).all():
        raise DataError("a datastore takes finite embeddings, found NaN or infinity; look at the embeddings")
    return replace(contents, embedding_SE=embedding_SE)
