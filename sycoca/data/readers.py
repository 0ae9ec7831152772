"""Read image-caption data sets as people have them: Karpathy splits, COCO captions, tables; images in a folder or in a tar."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sycoca.types import DataError

if TYPE_CHECKING:
    import pandas as pd

KARPATHY_RESTVAL = "restval"
"""Karpathy's COCO split: the part of the official validation set that everybody trains on."""


class ImageLocation(NamedTuple):
    """Bytes of a file: all of them where `num_bytes` is None. Several processes may read one file at random."""

    path: Path
    offset: int = 0
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One image. `key` has neither dot nor slash; `image` is None where the image is missing; captions may be none or empty."""

    key: str
    image: ImageLocation | None
    captions: tuple[str, ...]
    meta: Mapping[str, Any]


class Images(Protocol):
    """Where images are found by the names that annotations give them."""

    def find(self, name: str) -> ImageLocation | None: ...


class FolderImages:
    """Images below a folder, by path relative to it (or absolute)."""

    def __init__(self, root: Path):
        self._root = root

    def find(self, name: str) -> ImageLocation | None:
        path = self._root / name
        return ImageLocation(path) if path.is_file() else None


class TarImages:
    """Images in an uncompressed tar, by member name, or by file name where only one member has it."""

    def __init__(self, path: Path):
        self._by_name = index_tar(path)
        times = Counter(Path(name).name for name in self._by_name)
        self._by_file = {file: at for name, at in self._by_name.items() if times[file := Path(name).name] == 1}

    def find(self, name: str) -> ImageLocation | None:
        return self._by_name.get(name) or self._by_file.get(Path(name).name)


def open_images(path: Path) -> Images:
    """A folder's images, or a tar's. Raises DataError where there is neither."""
    if path.is_dir():
        return FolderImages(path)
    if path.is_file():
        return TarImages(path)
    raise DataError(f"no folder and no tar of images at {path}")


def index_tar(path: Path) -> dict[str, ImageLocation]:
    """Where each file of an uncompressed tar lies. Raises DataError for anything else."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {
                member.name.removeprefix("./"): ImageLocation(path, member.offset_data, member.size)
                for member in tar
                if member.isfile()
            }
    except tarfile.TarError as error:
        raise DataError(f"{path}: not an uncompressed tar ({error}); decompress it first, images are read at random") from error


def read_bytes(location: ImageLocation) -> bytes:
    """The bytes of one image, from its file or from its place in a tar."""
    with location.path.open("rb") as file:
        file.seek(location.offset)
        return file.read(-1 if location.num_bytes is None else location.num_bytes)


def build_key(name: str) -> str:
    """A sample's key from an image's name: no extension, only letters, digits, `_` and `-` (WebDataset splits at dots)."""
    return re.sub(r"[^\w-]+", "_", re.sub(r"\.[^./]*$", "", name).strip("./"))


def read_karpathy(json_path: Path, images: Images, *, split: str) -> Iterator[Record]:
    """The images of one split of a Karpathy JSON; `restval` counts as `train`. Raises DataError for an unknown split."""
    rows = read_rows(json_path, "images", needed={"filename", "split", "sentences"})
    known = Counter("train" if row["split"] == KARPATHY_RESTVAL else row["split"] for row in rows)
    if split not in known:
        raise DataError(f"{json_path}: no image in split {split!r}; splits there: {dict(known)}")
    for row in rows:
        if split != ("train" if row["split"] == KARPATHY_RESTVAL else row["split"]):
            continue
        name = row["filename"]
        yield Record(
            key=build_key(name),
            image=images.find(f"{row['filepath']}/{name}" if "filepath" in row else name) or images.find(name),
            captions=tuple(_clean(sentence["raw"]) for sentence in row["sentences"]),
            meta={"file_name": name},
        )


def read_coco(json_path: Path, images: Images) -> Iterator[Record]:
    """The images of a COCO captions JSON, each with all its captions in the file's order."""
    rows = read_rows(json_path, "images", needed={"id", "file_name"})
    captions: dict[Any, list[str]] = {row["id"]: [] for row in rows}
    for annotation in read_rows(json_path, "annotations", needed={"image_id", "caption"}):
        if annotation["image_id"] not in captions:
            raise DataError(f"{json_path}: a caption's image_id {annotation['image_id']!r} is no image's id")
        captions[annotation["image_id"]].append(_clean(annotation["caption"]))
    for row in rows:
        yield Record(
            key=build_key(row["file_name"]),
            image=images.find(row["file_name"]),
            captions=tuple(captions[row["id"]]),
            meta={"file_name": row["file_name"], "image_id": row["id"]},
        )


def read_table(
    file: Path, images: Images, *, image_column: str, caption_column: str, is_joining_rows: bool
) -> Iterator[Record]:
    """The rows of a CSV, TSV or Parquet file; with `is_joining_rows`, all rows of one image are one record."""
    table = _load_table(file)
    for column in (image_column, caption_column):
        if column not in table.columns:
            raise DataError(f"{file}: no column {column!r}; columns there: {', '.join(map(str, table.columns))}")
    texts = table[caption_column].fillna("").astype(str).map(_clean)
    names = table[image_column].fillna("").astype(str).str.strip()
    names = names.where(names != "", [f"row {number}" for number in range(1, len(names) + 1)])  # so that it can be reported
    if is_joining_rows:
        pairs = texts.groupby(names, sort=False).agg(tuple).items()
    else:
        pairs = zip(names, ((text,) for text in texts))
    for name, captions in pairs:
        yield Record(build_key(str(name)), images.find(str(name)), captions, meta={"file_name": name})


def _clean(text: str) -> str:
    """One line, single spaces."""
    return " ".join(text.split())


def read_rows(path: Path, name: str, *, needed: set[str]) -> list[dict[str, Any]]:
    """The list `name` of a JSON object, every row an object with the needed keys, maybe with more. Raises DataError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict) or not isinstance(tree.get(name), list):
        found = ", ".join(tree) if isinstance(tree, dict) else type(tree).__name__
        raise DataError(f"{path}: expected an object with a list {name!r}, found {found}")
    for number, row in enumerate(tree[name]):
        if not isinstance(row, dict) or not needed <= row.keys():
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{path}: {name}[{number}]: expected the keys {sorted(needed)}, found {found}")
    return tree[name]


def _load_table(file: Path) -> "pd.DataFrame":
    import pandas as pd  # slow to import, and only tables need it

    separators = {".csv": ",", ".tsv": "\t"}
    try:
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        if file.suffix in separators:
            return pd.read_csv(file, sep=separators[file.suffix], dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ImportError) as error:
        raise DataError(f"{file}: cannot be read as {file.suffix} ({error})") from error
    raise DataError(f"{file}: expected a table named .csv, .tsv or .parquet")
