"""What tools/build_datastore.py does: where rows come from, how a datastore is begun, which rows stay."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from sycoca.captioners.datastore import Datastore, build_datastore
from sycoca.captioners.datastore_files import read_text_file, rows_of_store, rows_of_texts
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import load_encoder
from sycoca.captioners.linear_aligner import load_aligner
from sycoca.captioners.text_rows import Row, TextRows
from sycoca.captioners.transform import fit_transform
from sycoca.types import ConfigError


class RowSource(NamedTuple):
    """Captions of an embedding store's split, or texts of a file with the encoder that embeds them; None is not given."""

    embeddings: Path | None
    split: str
    texts: Path | None
    encoder: str | None


class BuildPlan(NamedTuple):
    """How a datastore is begun."""

    transform: list[str]
    """Fitted on the rows; not read with an aligner."""
    aligner: Path | None
    """Gives the transform of its texts, and l2 after it."""
    index: str
    probes: int


def read_rows(source: RowSource) -> TextRows:
    """The rows with raw embeddings. Raises ConfigError unless there is one source, DataError where it cannot be read."""
    if (source.embeddings is None) == (source.texts is None):
        raise ConfigError("expected rows from --embeddings, or from --texts with --encoder: one of the two")
    if source.embeddings is not None:
        return rows_of_store(EmbeddingStore(source.embeddings, source.split))
    if source.texts is None or source.encoder is None:
        raise ConfigError("--texts: expected --encoder too, which embeds them")
    return rows_of_texts(read_text_file(source.texts), load_encoder(source.encoder))


def begin_datastore(source: RowSource, plan: BuildPlan, *, allow_held_out: bool) -> Datastore:
    """A new datastore of the source's rows. Raises ConfigError, DataError as `read_rows` and `build_datastore`."""
    contents = read_rows(source)
    if plan.aligner is None:
        transform = fit_transform(plan.transform, lambda: [torch.from_numpy(contents.embedding_SE)])
        return build_datastore(
            contents, transform, index=plan.index, num_probes=plan.probes, allow_held_out=allow_held_out
        )
    aligner = load_aligner(plan.aligner)
    datastore = build_datastore(
        contents, aligner.target_transform.then_l2(), index=plan.index, num_probes=plan.probes, allow_held_out=allow_held_out
    )
    datastore.check_aligner(aligner)
    return datastore


def rows_to_keep(*, min_score: float | None, origin: str | None, split: str | None) -> Callable[[Row], bool]:
    """Whether a row is all that is asked for; None asks for nothing. A row without a score has not reached any."""

    def is_kept(row: Row) -> bool:
        is_good = min_score is None or row.score >= min_score
        return is_good and origin in (None, row.origin) and split in (None, row.split)

    return is_kept
