"""A datastore on disk, and rows for one from an embedding store or a file of texts.

    DATASTORE/meta.json                  what it is, and which version is current; replaced in one step
    DATASTORE/00000001/rows.json         texts, sources, splits, origins
                       embedding.npy score.npy transform.safetensors index.faiss (unless it is exact)
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sycoca.captioners.datastore import Datastore
from sycoca.captioners.embeddings import Pairs
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.row_index import load_index, save_index
from sycoca.captioners.storage import load_tensors, read_facts, save_tensors
from sycoca.captioners.text_rows import Origin, Row, TextRows
from sycoca.captioners.transform import from_tensors
from sycoca.data.shard_writer import save_text
from sycoca.types import DataError, image_of

KIND = "datastore"
_TRANSFORM = "datastore transform"
_NAMES = ("text", "source", "split", "origin")


def save_datastore(datastore: Datastore, folder: Path) -> None:
    """Write it whole or not at all; an older version in the folder is in use until then, and then removed."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    version = f"{max(versions, default=0) + 1:08d}"
    draft = folder / f".{version}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    columns = {name: [getattr(row, name) for row in datastore.rows] for name in _NAMES}
    (draft / "rows.json").write_text(json.dumps(columns), encoding="utf-8")
    np.save(draft / "score.npy", np.array([row.score for row in datastore.rows], dtype=np.float64))
    np.save(draft / "embedding.npy", datastore.embedding_SE)
    transform = datastore.transform
    save_tensors(draft / "transform.safetensors", transform.tensors(""), {"kind": _TRANSFORM, "kinds": transform.kinds})
    save_index(datastore.index, draft / "index.faiss")
    os.replace(draft, folder / version)
    index = {"index": datastore.index.name, "num_probes": datastore.index.num_probes}
    facts = {"kind": KIND, "version": version, "fingerprint": datastore.fingerprint, **index}
    save_text(folder / "meta.json", json.dumps(facts, indent=1))
    for old in versions:
        shutil.rmtree(folder / f"{old:08d}")


def load_datastore(folder: Path) -> Datastore:
    """What `save_datastore` wrote; embeddings stay on disk until they are read. Raises DataError for another folder."""
    facts = read_facts(folder / "meta.json", kind=KIND)
    version = folder / facts["version"]
    columns = json.loads((version / "rows.json").read_text(encoding="utf-8"))
    scores = np.load(version / "score.npy").tolist()
    rows = [Row(*fields) for fields in zip(*(columns[name] for name in _NAMES), scores, strict=True)]
    embedding_SE = np.load(version / "embedding.npy", mmap_mode="r")
    tensors, about = load_tensors(version / "transform.safetensors", kind=_TRANSFORM)
    index = load_index(version / "index.faiss", embedding_SE, facts["index"], facts["num_probes"])
    contents = TextRows(rows, embedding_SE, facts["fingerprint"])
    return Datastore(contents, from_tensors(about["kinds"], tensors, ""), index)


def rows_of_store(store: Pairs) -> TextRows:
    """Every caption of a split of an embedding store, raw, with its image as its source."""
    rows: list[Row] = []
    blocks: list[np.ndarray] = []
    for block in store.blocks():
        sources = [image_of(block.keys[image]) for image in block.image_of_text_N.tolist()]
        rows += [Row(text, source, store.split) for text, source in zip(block.texts, sources, strict=True)]
        blocks.append(block.text_NE.numpy())
    return TextRows(rows, np.concatenate(blocks), store.fingerprint)


def rows_of_texts(rows: Sequence[Row], encoder: FrozenEncoder) -> TextRows:
    """The rows with their texts embedded."""
    return TextRows(list(rows), encoder.encode_text([row.text for row in rows]).cpu().numpy(), encoder.fingerprint)


def read_text_file(path: Path) -> list[Row]:
    """One text a line, or with the ending .jsonl objects of `text` and, if known, `source`, `split`, `origin`, `score`.

    Empty lines are passed over. Raises DataError with the line's number.
    """
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [_read_line(line, f"{path}:{number}", is_json=path.suffix == ".jsonl") for number, line in lines if line.strip()]


def _read_line(line: str, where: str, *, is_json: bool) -> Row:
    if not is_json:
        return Row(line.strip(), "")
    try:
        entry: dict[str, Any] = json.loads(line)
        row = Row(**{"source": "", **entry})
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{where}: expected an object of {', '.join(Row._fields)}; {error}") from error
    if not isinstance(row.text, str) or not isinstance(row.score, float | int) or row.origin not in get_args(Origin):
        raise DataError(f"{where}: expected text, a score as a number and an origin of {' or '.join(get_args(Origin))}")
    return row
