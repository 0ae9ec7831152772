"""Nearest rows by inner product through FAISS: exact (`Flat`), or an index string of FAISS (`IVF1024,Flat`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from sycoca.types import ConfigError, DataError

EXACT = "Flat"
NUM_PROBES = 32
"""Lists that an inverted index looks into for each query."""
BLOCK_ROWS = 1 << 14
"""Rows that are read into memory at a time."""


@dataclass
class RowIndex:
    """A FAISS index whose row numbers are those of a datastore, in the order they were added."""

    inner: Any
    name: str
    num_probes: int

    def add(self, embedding_SE: NDArray[np.float32]) -> None:
        """Put rows behind those that are there."""
        for first in range(0, len(embedding_SE), BLOCK_ROWS):
            self.inner.add(np.ascontiguousarray(embedding_SE[first : first + BLOCK_ROWS]))

    def search(self, query_NE: NDArray[np.float32], k: int, *, effort: int = 1) -> tuple[NDArray, NDArray]:
        """`(score_NK, row_NK)`, best first; row -1 where no more was found. `effort` multiplies the lists looked into."""
        lists = faiss.try_extract_index_ivf(self.inner)
        if lists is not None:
            lists.nprobe = min(effort * self.num_probes, lists.nlist)
        return self.inner.search(query_NE, k)

    def is_exhaustive(self, effort: int) -> bool:
        """Whether a search with this effort looks into every list."""
        lists = faiss.try_extract_index_ivf(self.inner)
        return lists is None or effort * self.num_probes >= lists.nlist


def build_index(embedding_SE: NDArray[np.float32], name: str, num_probes: int) -> RowIndex:
    """An index that holds the rows, trained on them where it needs that. Raises ConfigError, DataError."""
    try:
        inner = faiss.index_factory(embedding_SE.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"index {name!r}: FAISS does not know it; for example {EXACT} or IVF1024,Flat") from error
    if not inner.is_trained:
        try:
            inner.train(np.ascontiguousarray(embedding_SE))
        except RuntimeError as error:
            raise DataError(
                f"index {name!r} cannot be trained on {len(embedding_SE)} rows; take {EXACT}, or fewer lists (IVF64,Flat)"
            ) from error
    index = RowIndex(inner, name, num_probes)
    index.add(embedding_SE)
    return index


def save_index(index: RowIndex, path: Path) -> None:
    """Write the index, except an exact one, that its rows alone make again."""
    if index.name != EXACT:
        faiss.write_index(index.inner, str(path))


def load_index(path: Path, embedding_SE: NDArray[np.float32], name: str, num_probes: int) -> RowIndex:
    """What `save_index` wrote, for these rows. Raises DataError."""
    if name == EXACT:
        return build_index(embedding_SE, name, num_probes)
    try:
        index = RowIndex(faiss.read_index(str(path)), name, num_probes)
    except RuntimeError as error:
        raise DataError(f"{path}: no FAISS index ({error}); build the datastore again") from error
    if index.inner.ntotal != len(embedding_SE):
        found = f"an index of {index.inner.ntotal} rows beside {len(embedding_SE)} texts"
        raise DataError(f"{path}: {found}; build the datastore again")
    return index
