"""Captions for an image, as ReCap and SmallCap find them: the nearest to where an aligner takes it, in a datastore."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from sycoca.captioners.alignment import AlignmentConfig
from sycoca.captioners.datastore import Datastore, build_datastore
from sycoca.captioners.datastore_files import load_datastore, save_datastore
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner, load_aligner
from sycoca.captioners.row_index import EXACT, NUM_PROBES
from sycoca.captioners.text_rows import TextRows
from sycoca.config import Config
from sycoca.types import DataError, image_of

_ALIGNER, _DATASTORE = "aligner.safetensors", "datastore"


class RetrievalConfig(Config):
    """How captions are found, in a captioner's configuration."""

    alignment: AlignmentConfig = AlignmentConfig()
    """Of the spaces that have a map."""
    index: str = EXACT
    """Of FAISS."""
    num_probes: int = Field(default=NUM_PROBES, ge=1)


class CaptionRetriever:
    """The datastore's rows are where the aligner maps to, with unit norm: inner products are cosines.

    Raises DataError where encoder, aligner and datastore do not belong together, or the datastore has fewer than `num` rows.
    """

    def __init__(self, encoder: FrozenEncoder, aligner: LinearAligner, datastore: Datastore, *, num: int):
        aligner.check_spaces(source=encoder.fingerprint, target=encoder.fingerprint)
        datastore.check_aligner(aligner)
        if num > len(datastore):
            raise DataError(
                f"captioner.prompt asks for {num} captions of a datastore of {len(datastore)}; ask for fewer "
                "(num_items, pool), or add rows"
            )
        self.encoder, self.aligner, self.datastore, self.num = encoder, aligner, datastore, num

    def search(self, image_BE: Tensor, keys: Sequence[str], *, num: int | None = None, excludes_own: bool = True) -> Tensor:
        """BK: the `num` rows nearest to each raw embedding, best first, without those of the key's image. Raises DataError."""
        num = self.num if num is None else num
        if num == 0:
            return torch.zeros((len(keys), 0), dtype=torch.int64)
        query_BE = F.normalize(self.aligner.apply(image_BE), dim=-1)
        excluded = [[image_of(key)] if key and excludes_own else [] for key in keys]
        return self.datastore.search(query_BE, num, exclude_sources=excluded).row_NK

    def save(self, folder: Path) -> None:
        """Write aligner and datastore; the encoder stays where it is."""
        self.aligner.save(folder / _ALIGNER)
        save_datastore(self.datastore, folder / _DATASTORE)

    @classmethod
    def load(cls, folder: Path, encoder: FrozenEncoder, *, num: int) -> Self:
        """What `save` wrote. Raises DataError, also as the constructor does."""
        return cls(encoder, load_aligner(folder / _ALIGNER), load_datastore(folder / _DATASTORE), num=num)


def build_retriever(
    encoder: FrozenEncoder, contents: TextRows, aligner: LinearAligner, config: RetrievalConfig, *, num: int
) -> CaptionRetriever:
    """A retriever of these raw rows. Raises DataError for rows of a held-out split, or too few of them."""
    transform = aligner.target_transform.then_l2()
    datastore = build_datastore(contents, transform, index=config.index, num_probes=config.num_probes)
    return CaptionRetriever(encoder, aligner, datastore, num=num)
