"""A datastore of captions: rows of text with their embeddings, searched by inner product and aggregated by cosine.

Rows go through the datastore's transform when they come in; queries come as they should be compared: with unit rows and unit
queries inner products are cosines.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.row_index import BLOCK_ROWS, EXACT, NUM_PROBES, RowIndex, build_index
from sycoca.captioners.text_rows import Row, TextRows, admit_rows
from sycoca.captioners.transform import EmbeddingTransform
from sycoca.types import ConfigError, DataError


class Found(NamedTuple):
    """The nearest rows of each query, best first."""

    row_NK: Tensor
    """int64, places in the datastore."""
    score_NK: Tensor
    """Inner products, float32."""


class Datastore:
    """Texts of one embedding space, already transformed; `build_datastore` makes one of raw rows."""

    def __init__(self, contents: TextRows, transform: EmbeddingTransform, index: RowIndex):
        self.fingerprint, self.transform, self.index = contents.fingerprint, transform, index
        self._hold(contents)

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, query_NE: Tensor, k: int, *, exclude_sources: Sequence[Collection[str]] | None = None) -> Found:
        """The k rows of largest inner product, on the CPU; `exclude_sources[i]` names images whose texts query i must not get.

        More is fetched until k remain, from more lists where the index has lists. Raises DataError where fewer than k can
        remain, or the query is of another width.
        """
        query_NE = self._checked(query_NE)
        excluded = [self._numbers_of(names) for names in exclude_sources or [()] * len(query_NE)]
        if len(excluded) != len(query_NE):
            raise DataError(f"exclude_sources: expected one collection a query, {len(query_NE)}, found {len(excluded)}")
        most = max((int(self._count_of_source[numbers].sum()) for numbers in excluded), default=0)
        if not 1 <= k <= len(self) - most:
            left_out = f", {most} of them excluded for one query" if most else ""
            raise DataError(f"{k} rows asked of a datastore of {len(self)}{left_out}; ask for fewer (at least 1), or add rows")
        row_NK, score_NK = np.full((len(query_NE), k), -1, np.int64), np.zeros((len(query_NE), k), np.float32)
        pending, fetch, effort = np.arange(len(query_NE)), k + most, 1
        while len(pending):
            scores, rows = self.index.search(query_NE[pending].numpy(), fetch, effort=effort)
            for query, score_K, row_K in zip(pending, scores, rows, strict=True):
                is_kept_K = (row_K >= 0) & ~np.isin(self._source_S[row_K], excluded[query])
                if is_kept_K.sum() >= k:
                    row_NK[query], score_NK[query] = row_K[is_kept_K][:k], score_K[is_kept_K][:k]
            pending = pending[row_NK[pending, 0] < 0]
            if len(pending) and fetch == len(self) and self.index.is_exhaustive(effort):
                raise DataError(f"the index {self.index.name} does not find {k} rows; build the datastore with {EXACT}")
            fetch, effort = min(2 * fetch, len(self)), 2 * effort
        return Found(torch.from_numpy(row_NK), torch.from_numpy(score_NK))

    @torch.no_grad()
    def aggregate(self, query_NE: Tensor, temperature: float) -> Tensor:
        """NE float32: sum_j softmax_j(temperature * cos(query, row_j)) row_j over all rows (CgT-GAN's CLIP-agg).

        0 gives the rows' mean, a large temperature the row of the largest cosine. Rows are read in blocks.
        """
        if not temperature >= 0:
            raise ConfigError(f"temperature: it multiplies cosines; expected 0 or more, found {temperature}")
        self._checked(query_NE)
        query_NE = F.normalize(query_NE.double(), dim=-1)
        best_N1 = query_NE.new_full((len(query_NE), 1), -torch.inf)
        total_N1, mean_NE = torch.zeros_like(best_N1), torch.zeros_like(query_NE)
        for block_SE in self._blocks():
            block_SE = block_SE.to(query_NE)
            logit_NS = temperature * (query_NE @ F.normalize(block_SE, dim=-1).T)
            new_best_N1 = best_N1.maximum(logit_NS.amax(1, keepdim=True))
            kept_N1, weight_NS = (best_N1 - new_best_N1).exp(), (logit_NS - new_best_N1).exp()
            total_N1 = total_N1 * kept_N1 + weight_NS.sum(1, keepdim=True)
            mean_NE = mean_NE * kept_N1 + weight_NS @ block_SE
            best_N1 = new_best_N1
        return (mean_NE / total_N1).float()

    def texts(self, row_NK: Tensor) -> list[list[str]]:
        """The texts of found rows, query by query."""
        return [[self.rows[row].text for row in row_K] for row_K in row_NK.tolist()]

    def extend(self, contents: TextRows, *, allow_held_out: bool = False) -> None:
        """Add raw rows; the transform stays as it was fitted. Raises DataError for another encoder's, or held-out ones."""
        self.check_encoder(contents.fingerprint)
        added = admit_rows(contents, self.transform, allow_held_out=allow_held_out)
        self.index.add(added.embedding_SE)
        embedding_SE = np.concatenate([self.embedding_SE, added.embedding_SE])
        self._hold(TextRows([*self.rows, *added.rows], embedding_SE, self.fingerprint))

    def swap(self, contents: TextRows, *, allow_held_out: bool = False) -> None:
        """Put other raw rows of the same encoder in place of all: another domain, with nothing trained. Raises as `extend`."""
        self.check_encoder(contents.fingerprint)
        self._replace(admit_rows(contents, self.transform, allow_held_out=allow_held_out))

    def filter(self, is_kept: Callable[[Row], bool]) -> None:
        """Keep the rows of which `is_kept` is true. Raises DataError where none is left."""
        kept = [bool(is_kept(row)) for row in self.rows]
        self._replace(TextRows(list(compress(self.rows, kept)), self.embedding_SE[np.array(kept)], self.fingerprint))

    def inspect(self) -> dict[str, Any]:
        """Counts of everything, for people."""
        scores = np.array([row.score for row in self.rows])
        known = scores[~np.isnan(scores)]
        return {
            "num_rows": len(self),
            "num_sources": len(self._count_of_source),
            "num_different_texts": len({row.text for row in self.rows}),
            "splits": dict(Counter(row.split for row in self.rows)),
            "origins": dict(Counter(row.origin for row in self.rows)),
            "num_scored": len(known),
            "mean_score": float(known.mean()) if len(known) else None,
            "fingerprint": self.fingerprint,
            "transform": self.transform.kinds,
            "index": self.index.name,
            "width": self.embedding_SE.shape[1],
        }

    def check_encoder(self, fingerprint: str) -> None:
        """Raises DataError unless this is the fingerprint of the encoder whose rows these are."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"this datastore was built with the encoder {self.fingerprint} and is used with {fingerprint}: they do not "
                "belong together. Load the encoder it was built with, or build it again"
            )

    def check_aligner(self, aligner: LinearAligner) -> None:
        """Raises DataError unless the aligner maps to where these rows are: same encoder, same transform but for a last l2."""
        self.check_encoder(aligner.target_fingerprint)
        target = aligner.target_transform
        if self.transform.fingerprint not in (target.fingerprint, target.then_l2().fingerprint):
            raise DataError(
                f"the aligner maps to texts after {target.kinds}, fitted on its pairs, and this datastore's rows went through "
                f"{self.transform.kinds}: build the datastore with the aligner (--aligner)"
            )

    def _replace(self, contents: TextRows) -> None:
        _check_not_empty(contents)
        self.index = build_index(contents.embedding_SE, self.index.name, self.index.num_probes)
        self._hold(contents)

    def _hold(self, contents: TextRows) -> None:
        self.rows, self.embedding_SE = contents.rows, contents.embedding_SE
        self._number_of_source: dict[str, int] = {}
        numbers = [self._number_of_source.setdefault(row.source, len(self._number_of_source)) for row in self.rows]
        self._source_S = np.array(numbers, dtype=np.int64)
        self._count_of_source = np.bincount(self._source_S)

    def _numbers_of(self, sources: Collection[str]) -> NDArray[np.int64]:
        assert not isinstance(sources, str), "exclude_sources holds a collection of names for each query"
        return np.array([self._number_of_source[name] for name in set(sources) if name in self._number_of_source], np.int64)

    def _checked(self, query_NE: Tensor) -> Tensor:
        width = self.embedding_SE.shape[1]
        if query_NE.ndim != 2 or query_NE.shape[1] != width or not query_NE.isfinite().all():
            raise DataError(f"expected finite queries of {width} numbers, one a row, found {tuple(query_NE.shape)}")
        return query_NE.detach().cpu().float().contiguous()

    def _blocks(self) -> Iterator[Tensor]:
        for first in range(0, len(self), BLOCK_ROWS):
            yield torch.from_numpy(np.array(self.embedding_SE[first : first + BLOCK_ROWS]))


def build_datastore(
    contents: TextRows, transform: EmbeddingTransform, *, index: str = EXACT, num_probes: int = NUM_PROBES,
    allow_held_out: bool = False,
) -> Datastore:  # fmt: skip
    """A datastore of raw rows. Raises DataError for no rows or held-out ones, ConfigError for an index FAISS does not know."""
    _check_not_empty(contents)
    admitted = admit_rows(contents, transform, allow_held_out=allow_held_out)
    return Datastore(admitted, transform, build_index(admitted.embedding_SE, index, num_probes))


def _check_not_empty(contents: TextRows) -> None:
    if not contents.rows:
        raise DataError("a datastore without rows finds nothing: no row was given, or none is left")
