"""Embeddings of shards on disk: images and captions encoded once, for everything that is fitted or built on them.

    STORE/meta.json                      the encoder's name, fingerprint and width
    STORE/parts/<split>-<shard>-<hash>/  one shard: images.npy, texts.npy, image_of_text.npy, rows.json (keys, texts)

A part is written under a temporary name and renamed when it is whole, so an interrupted job goes on with the next shard, at
any number of processes. Rows are raw: whoever uses them says how they are normalised.
"""

import hashlib
import json
import os
import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.storage import read_facts
from sycoca.config import parse_config
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.shard_writer import save_text
from sycoca.data.shards import expand_shards
from sycoca.distributed import barrier, rank, world_size
from sycoca.types import DataError

KIND = "embedding store"
_HEAD_BYTES = 1 << 16


class Reading(NamedTuple):
    """Which shards are embedded and how."""

    shards: Sequence[str]
    split: str
    batch_size: int
    num_workers: int


class EmbeddedBlock(NamedTuple):
    """One shard's rows, raw float32."""

    keys: list[str]
    texts: list[str]
    image_NE: Tensor
    text_NE: Tensor
    image_of_text_N: Tensor
    """Each caption's row of `image_NE`."""


class Pairs(Protocol):
    """Images with their captions, all embedded by one encoder: an EmbeddingStore, or one with captions added."""

    @property
    def split(self) -> str:
        """What the pairs are."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        ...

    @property
    def num_texts(self) -> int:
        """Captions of all images together."""
        ...

    @property
    def keys(self) -> list[str]:
        """The images' names, by row number."""
        ...

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[EmbeddedBlock]:
        """The rows in parts, in the same order each time."""
        ...

    def image_rows(self, rows: Sequence[int], /) -> Tensor:
        """NE: images by row number."""
        ...


class EmbeddingStore:
    """One split of a store, read shard by shard; single images are memory-mapped. Raises DataError where it is empty."""

    def __init__(self, folder: Path, split: str):
        facts = read_facts(folder / "meta.json", kind=KIND)
        self.split, self.fingerprint, self.embed_width = split, facts["fingerprint"], facts["embed_width"]
        abouts = {path: json.loads((path / "rows.json").read_text(encoding="utf-8")) for path in _list_parts(folder)}
        self._parts = {path: about for path, about in abouts.items() if about["split"] == split}
        self.keys: list[str] = [key for about in self._parts.values() for key in about["keys"]]
        self.num_texts = sum(len(about["texts"]) for about in self._parts.values())
        if not self.keys:
            known = ", ".join(sorted({about["split"] for about in abouts.values()})) or "nothing"
            raise DataError(f"{folder}: no images of the split {split!r}; there is {known}. Embed them first (tools/embed.py)")
        self._ends = list(accumulate(len(about["keys"]) for about in self._parts.values()))

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        """Each image's row. Raises DataError for a key that occurs twice."""
        rows = {key: row for row, key in enumerate(self.keys)}
        if len(rows) < len(self.keys):
            twice = next(key for row, key in enumerate(self.keys) if rows[key] != row)
            raise DataError(f"{twice}: two images of this name in the split {self.split!r}; a key names one image")
        return rows

    def check_encoder(self, fingerprint: str) -> None:
        """Raises DataError unless this is the fingerprint of the encoder whose embeddings these are."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"this store holds embeddings of the encoder {self.fingerprint} and is used with {fingerprint}: they do not "
                "belong together. Load the encoder that it was made with, or embed again into another folder"
            )

    def blocks(self) -> Iterator[EmbeddedBlock]:
        """Every shard's rows, in the same order each time."""
        for path, about in self._parts.items():
            yield EmbeddedBlock(
                about["keys"], about["texts"],
                *(torch.from_numpy(np.load(path / f"{name}.npy")) for name in ("images", "texts", "image_of_text")),
            )  # fmt: skip

    def keys_by_part(self) -> list[tuple[Path, list[str]]]:
        """Each part's folder with its images' keys, in the order of the rows."""
        return [(path, about["keys"]) for path, about in self._parts.items()]

    def image_rows(self, rows: Sequence[int]) -> Tensor:
        """NE: images by row number, in any order."""
        out_NE = np.empty((len(rows), self.embed_width), np.float32)
        for place, row in enumerate(rows):
            part = bisect_right(self._ends, row)
            out_NE[place] = self._images[part][row - self._ends[part]]  # from the part's end: numbers below 0 count from there
        return torch.from_numpy(out_NE)

    @cached_property
    def _images(self) -> list[np.ndarray]:
        return [np.load(path / "images.npy", mmap_mode="r") for path in self._parts]


def embed_shards(encoder: FrozenEncoder, folder: Path, reading: Reading) -> dict[str, Any]:
    """Embed every image and caption of the shards that the store does not hold yet; all ranks share the shards.

    Gives `num_images`, `num_captions` of the split, `num_embedded` shards now, `num_kept` shards from before, the encoder's
    `fingerprint`. Raises DataError where the store was begun with another encoder, or shards cannot be read.
    """
    if rank() == 0:
        _hold_encoder(folder, encoder)
    barrier()
    shards = expand_shards(list(reading.shards), allow_pipe=False)
    targets = {shard: folder / "parts" / _name_part(shard, reading.split) for shard in shards}
    pending = [shard for shard in shards if not targets[shard].is_dir()]
    barrier()  # before any rank finishes a part that another has not looked for yet
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=rank() > 0) as progress:
        task = progress.add_task("images", total=None)
        for shard in pending[rank() :: world_size()]:
            progress.update(task, description=f"{shard}, images")
            _embed_shard(encoder, shard, targets[shard], reading, progress=(progress, task))
    barrier()
    store = EmbeddingStore(folder, reading.split)
    return {
        "num_images": len(store), "num_captions": store.num_texts, "num_embedded": len(pending),
        "num_kept": len(shards) - len(pending), "fingerprint": encoder.fingerprint,
    }  # fmt: skip


def _embed_shard(
    encoder: FrozenEncoder, shard: str, target: Path, reading: Reading, *, progress: tuple[Progress, TaskID]
) -> None:
    settings = {"shards": [shard], "batch_size": reading.batch_size, "num_workers": reading.num_workers}
    config = parse_config(DataConfig, {**settings, "transform": encoder.transform_config}, source="options")
    keys: list[str] = []
    captions: list[list[str]] = []
    images = [torch.zeros(0, encoder.embed_width)]
    for batch in build_eval_loader(config, rank=0, world_size=1, batch_size=reading.batch_size):
        images.append(encoder.encode_image(batch["image"]).cpu())
        keys += batch["key"]
        captions += batch["captions"]
        progress[0].advance(progress[1], len(batch["key"]))
    texts = [text for of_image in captions for text in of_image]
    numbers = np.repeat(np.arange(len(keys)), [len(of_image) for of_image in captions])
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    np.save(draft / "images.npy", torch.cat(images).numpy())
    np.save(draft / "texts.npy", encoder.encode_text(texts).cpu().numpy())
    np.save(draft / "image_of_text.npy", numbers.astype(np.int64))
    about = {"split": reading.split, "shard": Path(shard).name, "keys": keys, "texts": texts}
    (draft / "rows.json").write_text(json.dumps(about), encoding="utf-8")
    os.replace(draft, target)


def _hold_encoder(folder: Path, encoder: FrozenEncoder) -> None:
    """The first encoder makes the store its own."""
    path = folder / "meta.json"
    if not path.exists():
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        facts = {"encoder": encoder.name, "fingerprint": encoder.fingerprint, "embed_width": encoder.embed_width}
        save_text(path, json.dumps({"kind": KIND, **facts}, indent=1))
    found = read_facts(path, kind=KIND)
    if found["fingerprint"] != encoder.fingerprint:
        raise DataError(
            f"{folder} holds embeddings of {found['encoder']} ({found['fingerprint']}), and this is {encoder.name} "
            f"({encoder.fingerprint}): they do not belong together. Choose another folder"
        )


def _name_part(shard: str, split: str) -> str:
    """The same for the same file wherever it lies: told by its name, its size and how it begins."""
    path = Path(shard)
    digest = hashlib.sha256(f"{split}/{path.name}".encode())
    if path.is_file():
        digest.update(str(path.stat().st_size).encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return f"{split}-{path.stem}-{digest.hexdigest()[:8]}"


def _list_parts(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "parts").iterdir() if not path.name.startswith("."))
