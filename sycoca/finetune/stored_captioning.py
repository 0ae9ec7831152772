"""Captioners measured on images of an embedding store: what is written from the rows, against the captions beside them."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.config import Config
from sycoca.distributed import rank, world_size
from sycoca.evaluation.caption_metrics import score_captions
from sycoca.evaluation.captioning import CaptionedSet, caption_batches
from sycoca.finetune.closed_form import PairsConfig
from sycoca.types import DataError

CHOOSE_BY = "CIDEr"
"""The figure by which the best checkpoint is chosen."""

WriteRows = Callable[[Tensor, Sequence[str]], list[str]]
"""Rows of the store and their keys to captions."""


class EvaluateStoredConfig(Config):
    """Captions of the split `pairs.held_out`, `every` steps and at the end; 0 is never."""

    every: int = Field(default=1000, ge=0)
    batch_size: int = Field(default=32, ge=1)
    limit: int | None = Field(default=None, ge=1)
    """Images at most, of all ranks together, spread evenly over the split; null: all of them."""


class StoredImages:
    """Images of a split, by row, with all their captions. Raises DataError for an image without one."""

    def __init__(self, store: EmbeddingStore, config: EvaluateStoredConfig):
        self.store, self.config = store, config
        self.seconds = 0.0
        """Spent in `measure`, so that the time to fit can be told without it."""
        self.captions: list[list[str]] = []
        for block in store.blocks():
            texts: list[list[str]] = [[] for _ in block.keys]
            for text, image in zip(block.texts, block.image_of_text_N.tolist(), strict=True):
                texts[image].append(text)
            self.captions += texts
        lost = [key for key, texts in zip(store.keys, self.captions, strict=True) if not texts]
        if lost:
            raise DataError(f"{lost[0]}: an image without captions in the split {store.split!r}; nothing to compare with")

    def batches(self) -> Iterator[dict[str, Any]]:
        """This rank's share, as evaluations of captioning read it; `image` holds the images' rows."""
        limit, num = self.config.limit or len(self.store), len(self.store)
        own = range(0, num, max(1, num // limit))[:limit][rank() :: world_size()]
        for start in range(0, len(own), self.config.batch_size):
            rows = list(own[start : start + self.config.batch_size])
            keys = [self.store.keys[row] for row in rows]
            yield {"image": torch.tensor(rows), "key": keys, "captions": [self.captions[row] for row in rows]}

    def measure(self, write: WriteRows) -> tuple[dict[str, float], CaptionedSet]:
        """BLEU, ROUGE-L and CIDEr of what is written, with `num_images`, and the captions of all ranks' images.

        Raises DataError for a key that occurs twice.
        """
        started = time.perf_counter()
        captioned = caption_batches(self.batches(), write)
        figures = {**score_captions(*captioned).corpus, "num_images": float(len(captioned.predictions))}
        self.seconds += time.perf_counter() - started
        return figures, captioned


def open_held_out(pairs: PairsConfig, config: EvaluateStoredConfig, encoder: FrozenEncoder) -> StoredImages | None:
    """The held-out split where one is to be measured on. Raises DataError for another encoder's."""
    if pairs.held_out is None or not config.every:
        return None
    store = EmbeddingStore(Path(pairs.store), pairs.held_out)
    store.check_encoder(encoder.fingerprint)
    return StoredImages(store, config)
