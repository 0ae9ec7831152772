"""Sentences that a captioner learns from without their images."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from pydantic import model_validator

from sycoca.captioners.datastore_files import read_text_file, rows_of_store, rows_of_texts
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.text_rows import TextRows
from sycoca.captioners.transform import EmbeddingTransform
from sycoca.config import Config
from sycoca.types import DataError


class CorpusConfig(Config):
    """Sentences that people wrote: a file of them, or the captions of an embedding store; without either, the images' own."""

    texts: str | None = None
    """One a line, or JSON lines with `text`; embedded when the run starts."""
    store: str | None = None
    split: str = "train"

    @model_validator(mode="after")
    def _check(self) -> "CorpusConfig":
        if self.texts is not None and self.store is not None:
            raise ValueError("expected one source of sentences, found texts and store; leave one out")
        return self

    def read(self, encoder: FrozenEncoder, images: EmbeddingStore) -> TextRows:
        """Sentences with raw embeddings. Raises DataError for a store of another encoder, or without a sentence."""
        if self.texts is not None:
            rows = rows_of_texts(read_text_file(Path(self.texts)), encoder)
        else:
            store = EmbeddingStore(Path(self.store), self.split) if self.store is not None else images
            store.check_encoder(encoder.fingerprint)
            rows = rows_of_store(store)
        if not rows.rows:
            raise DataError("corpus: found no sentence; name a file of sentences, or a store with captions")
        return rows


class Corpus:
    """Sentences by number, spelled as a language model's tokens spell them, so that spelling does not tell who wrote.

    Which image a sentence was written for is not kept. Embeddings come transformed.
    """

    def __init__(self, rows: TextRows, lm: CaptionLM, *, max_tokens: int, transform: EmbeddingTransform):
        self._pad_captions = lm.pad_captions
        self.token_ids = [lm.encode_caption(row.text, max_tokens=max_tokens) for row in rows.rows]
        self.texts = [lm.decode_caption(ids) for ids in self.token_ids]
        self._embedding_SE, self._transform = rows.embedding_SE, transform

    def __len__(self) -> int:
        return len(self.texts)

    def collate(self, indices: Sequence[int], generators: Sequence[Random]) -> dict[str, Any]:
        """`embedding` (NE, of the sentences themselves), `token` (NT), `length`, `text`, `key`."""
        token_NT, length_N = self._pad_captions([self.token_ids[index] for index in indices])
        embedding_NE = self._transform(torch.tensor(self._embedding_SE[list(indices)]))
        facts = {"text": [self.texts[index] for index in indices], "key": [str(index) for index in indices]}
        return {"embedding": embedding_NE, "token": token_NT, "length": length_N, **facts}

    def collate_beside(
        self, images: EmbeddingStore, transform: EmbeddingTransform, indices: Sequence[int], generators: Sequence[Random]
    ) -> dict[str, Any]:
        """The same with `embedding` and `key` of images, their raw embeddings as `image`, and a sentence drawn for each
        without looking at it."""
        drawn = self.collate([generator.randrange(len(self)) for generator in generators], generators)
        image_NE = images.image_rows(indices)
        own = {"image": image_NE, "embedding": transform(image_NE), "key": [images.keys[index] for index in indices]}
        return {**drawn, **own}
