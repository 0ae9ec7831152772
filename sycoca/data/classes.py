"""Labelled images for classification: class folders, tars of them, or shards whose samples carry their label."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from random import Random
from typing import NamedTuple

import numpy as np

from sycoca.data.decode import IMAGE_EXTENSIONS
from sycoca.data.image_store import ImageStore, has_image_extension
from sycoca.data.readers import ImageLocation, index_tar, read_bytes
from sycoca.types import DataError

Label = str | int
"""A class's name (a folder's name as it stands) or its number."""
Members = dict[str, ImageLocation]


class TarSample(NamedTuple):
    """What lies in a tar under one key: members by lower-case extension, and the image's whole name."""

    key: str
    image: str
    members: Members


class _Labelled(NamedTuple):
    row: int
    name: str
    label: Label


class ClassRecords:
    """Images with their classes (`Records` of data/indexed.py). The text is empty: nothing may tell the class."""

    def __init__(self, store: ImageStore, row_N: np.ndarray, label_N: np.ndarray, class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self._store = store
        self._row_N = row_N
        self._label_N = label_N
        self.image_N, self.group_size = np.arange(len(row_N)), 1
        self._is_one_source = len(store.sources()) == 1

    def __len__(self) -> int:
        return len(self._row_N)

    def key(self, index: int) -> str:
        """The image's path in its source, after the source's number where there are several."""
        row = int(self._row_N[index])
        return self._store.name(row) if self._is_one_source else f"{self._store.source_of(row)}/{self._store.name(row)}"

    def image_name(self, index: int) -> str:
        """The image's path in its source."""
        return self._store.name(int(self._row_N[index]))

    def image(self, index: int) -> bytes:
        """The image's file."""
        return self._store.read(int(self._row_N[index]))

    def text(self, index: int, generator: Random) -> str:
        """None."""
        del index, generator
        return ""

    def target(self, index: int) -> int:
        """The class's place in `class_names`."""
        return int(self._label_N[index])

    def num_by_class(self) -> dict[str, int]:
        """How many images each class has."""
        return dict(zip(self.class_names, np.bincount(self._label_N, minlength=len(self.class_names)).tolist()))


def load_class_records(
    sources: Sequence[str], *, split: str | None = None, class_names: Sequence[str] | None = None
) -> ClassRecords:
    """The labelled images of folders and tars (or of folders, braces and wildcards of tars).

    Folders and plain tars are laid out `<class>/<file>` or, with `split`, `<split>/<class>/<file>`; in shards the label is the
    json's `class_name` or `label`, else the `.cls`. Classes are `class_names`, else the labels found, names in alphabetical
    order before numbers; give a validation set the names of its training set. Raises DataError for nothing found, an empty
    class folder, an image outside any class folder, several splits where none is named, a label not among `class_names`.
    """
    store = ImageStore(sources)
    found: list[_Labelled] = []
    for number, path in enumerate(store.sources()):
        rows = {store.name(row): row for row in store.rows_of(number)}
        found += _label_folder(path, rows, split) if path.is_dir() else _label_tar(path, rows, split)
    _check_layout(found, store, split)
    labels = sorted({image.label for image in found}, key=lambda label: (isinstance(label, int), label))
    names = list(dict.fromkeys(map(str, labels))) if class_names is None else list(class_names)
    places = {label: _find_place(label, names) for label in labels}
    for image in found:
        if places[image.label] is None:
            raise DataError(f"{image.name}: class {image.label!r} is none of the {len(names)}: {', '.join(names[:5])} ...")
    return ClassRecords(
        store,
        np.array([image.row for image in found], dtype=np.int64),
        np.array([places[image.label] for image in found], dtype=np.int64),
        names,
    )


def choose_label(members: Mapping[str, bytes], key: str, *, where: str) -> Label:
    """A sample's label: its json's `class_name` or `label`, else its `.cls`, else the folder it lies in.

    `members` holds the json and the cls, where there are any. Raises DataError, naming `where`, for a sample without a label.
    """
    try:
        meta = json.loads(members["json"]) if "json" in members else {}
        cls = members["cls"].decode().strip() if "cls" in members else ""
    except ValueError as error:
        raise DataError(f"{where}: its json or cls cannot be read ({error})") from error
    folder = PurePosixPath(key).parent.name
    named = [meta[name] for name in ("class_name", "label") if isinstance(meta, dict) and name in meta]
    label = [*named, int(cls) if cls.isdecimal() else cls or folder][0]
    if not isinstance(label, str | int) or label == "":
        raise DataError(f"{where}: no label; expected `class_name` or `label` in its json, a .cls, or a class folder")
    return label


def list_tar_samples(index: Mapping[str, ImageLocation]) -> Iterator[TarSample]:
    """The samples with an image, in order, of a tar as `index_tar` lists it; a name's first dot ends its key."""
    samples: dict[str, dict[str, str]] = {}
    for name in index:
        folder, _, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        if stem:
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[extension.lower()] = name
    for key, names in samples.items():
        image = next((names[kind] for kind in IMAGE_EXTENSIONS if kind in names), None)
        if image is not None:
            yield TarSample(key, image, {extension: index[name] for extension, name in names.items()})


def _label_folder(root: Path, rows: Mapping[str, int], split: str | None) -> Iterator[_Labelled]:
    top = root if split is None else root / split
    if not top.is_dir():
        raise DataError(f"{root}: no split {split!r}; folders there: {', '.join(_list_folders(root)) or 'none'}")
    for name in _list_folders(top):
        files = list((top / name).iterdir())
        if not any(path.is_dir() or has_image_extension(path.name) for path in files):
            raise DataError(f"{top / name}: a class folder without images ({', '.join(IMAGE_EXTENSIONS)}); fill or remove it")
    return _label_by_folder(rows, split)


def _label_tar(path: Path, rows: Mapping[str, int], split: str | None) -> Iterator[_Labelled]:
    index = index_tar(path)
    if not any(name.endswith((".json", ".cls")) for name in index):  # no shard: names may have dots
        yield from _label_by_folder(rows, split)
        return
    for sample in list_tar_samples(index):
        if _is_in_split(sample.image, split):
            members = {name: read_bytes(sample.members[name]) for name in ("json", "cls") if name in sample.members}
            label = choose_label(members, sample.key, where=f"{path}:{sample.key}")
            yield _Labelled(rows[sample.image], sample.image, label)


def _label_by_folder(rows: Mapping[str, int], split: str | None) -> Iterator[_Labelled]:
    for name, row in rows.items():
        if _is_in_split(name, split):
            yield _Labelled(row, name, PurePosixPath(name).parent.name)


def _check_layout(found: Sequence[_Labelled], store: ImageStore, split: str | None) -> None:
    """Labels that are folders' names must all lie at one depth: `<split>/<class>/<file>` without a split mixes the splits."""
    if not found:
        hint = f"<class>/<file> below {split!r}" if split else "<class>/<file>"
        raise DataError(f"{store.describe()}: no labelled image found; expected {hint}, or shards with labels")
    folders = {str(parent.parent) for image in found if (parent := PurePosixPath(image.name).parent).name == image.label}
    if any(image.label == "" for image in found):
        stray = next(image.name for image in found if image.label == "")
        raise DataError(f"{stray}: an image outside any class folder in {store.describe()}")
    if len(folders) > 1:
        raise DataError(
            f"{store.describe()}: class folders lie in {len(folders)} places ({', '.join(sorted(folders)[:5])}); "
            "name the one to read as the split"
        )


def _is_in_split(name: str, split: str | None) -> bool:
    return split is None or name.startswith(f"{split.rstrip('/')}/")


def _list_folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _find_place(label: Label, names: Sequence[str]) -> int | None:
    """The place of a name; of a number, its own unless the names are numbers too."""
    if str(label) in names:
        return names.index(str(label))
    is_place = isinstance(label, int) and label < len(names) and not any(map(str.isdecimal, names))
    return int(label) if is_place else None
