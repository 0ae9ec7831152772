"""Images by row or by name, from folders and tars, with nothing in memory but a few numpy arrays.

Forked loader workers would copy Python lists of names page by page, by counting references; arrays they share. Nothing is
held open, so a store travels to a worker as it is, and every process may read it at random.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand

from sycoca.data.decode import IMAGE_EXTENSIONS
from sycoca.data.readers import ImageLocation, index_tar, read_bytes
from sycoca.data.shards import expand_shards
from sycoca.types import DataError


class _Image(NamedTuple):
    name: str
    source: int
    offset: int
    num_bytes: int


class ImageStore:
    """The images of folders (with all below them) and of uncompressed tars, as rows in the order of the sources.

    Raises DataError for a source that is not there or has no image.
    """

    def __init__(self, sources: Sequence[str]):
        self._sources = expand_sources(sources)
        images: list[_Image] = []
        for number, path in enumerate(self._sources):
            found = list(_list_folder(number, path) if path.is_dir() else _list_tar(number, path))
            if not found:
                raise DataError(f"{path}: no image in it ({', '.join(IMAGE_EXTENSIONS)})")
            images += found
        self._name_N = pack_names(image.name for image in images)
        self._source_N = np.array([image.source for image in images], dtype=np.int32)
        self._offset_N = np.array([image.offset for image in images], dtype=np.int64)
        self._num_bytes_N = np.array([image.num_bytes for image in images], dtype=np.int64)
        self._known_K, self._row_K = _build_lookup(self._name_N)

    def __len__(self) -> int:
        return len(self._name_N)

    def describe(self) -> str:
        """The sources, for a message."""
        more = f" and {len(self._sources) - 3} more" if len(self._sources) > 3 else ""
        return ", ".join(map(str, self._sources[:3])) + more

    def sources(self) -> list[Path]:
        """The folders and tars, expanded."""
        return list(self._sources)

    def rows_of(self, source: int) -> range:
        """The rows of one source, by its number in `sources`."""
        start, end = np.searchsorted(self._source_N, [source, source + 1])
        return range(int(start), int(end))

    def source_of(self, row: int) -> int:
        """The number in `sources` of the row's source."""
        return int(self._source_N[row])

    def name(self, row: int) -> str:
        """The image's path in its source."""
        return self._name_N[row].decode()

    def find(self, name: str) -> int | None:
        """The row of a path in a source, or of a file name that only one image has; the first source that has it counts."""
        encoded = name.encode()
        place = int(np.searchsorted(self._known_K, encoded))
        is_known = place < len(self._known_K) and self._known_K[place] == encoded
        return int(self._row_K[place]) if is_known else None

    def require(self, name: str) -> int:
        """As `find`. Raises DataError where there is no such image."""
        row = self.find(name)
        if row is None:
            raise DataError(f"{name}: no such image in {self.describe()} (for example, {self.name(0)} is there)")
        return row

    def read(self, row: int) -> bytes:
        """The bytes of an image. Raises DataError where its file is gone or cannot be read."""
        path = self._sources[self._source_N[row]]
        try:
            if self._num_bytes_N[row] < 0:
                return (path / self.name(row)).read_bytes()
            return read_bytes(ImageLocation(path, int(self._offset_N[row]), int(self._num_bytes_N[row])))
        except OSError as error:
            raise DataError(f"{self.name(row)}: cannot be read from {path} ({error.strerror})") from error


def expand_sources(sources: Sequence[str]) -> list[Path]:
    """Folders of images as they are; tars, folders of tars, braces and wildcards as the tars they name. Raises DataError."""
    found: list[Path] = []
    for name in (name for source in sources for name in braceexpand(source)):
        path = Path(name)
        if path.is_dir() and not any(path.glob("*.tar")):
            found.append(path)
        elif path.exists() or has_magic(name):
            found += map(Path, expand_shards([name], allow_pipe=False))
        else:
            raise DataError(f"{name}: no folder and no tar of images there")
    if not found:
        raise DataError("images: expected at least one folder or tar, found none")
    return found


def pack_names(names: Iterable[str]) -> np.ndarray:
    """UTF-8 bytes as one array."""
    return np.array([name.encode() for name in names], dtype=np.bytes_)


def has_image_extension(name: str) -> bool:
    """Whether a file's name ends as an image's."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _list_folder(number: int, root: Path) -> Iterator[_Image]:
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()
        place = Path(folder).relative_to(root).as_posix()
        for file in sorted(filter(has_image_extension, files)):
            yield _Image(file if place == "." else f"{place}/{file}", number, 0, -1)


def _list_tar(number: int, path: Path) -> Iterator[_Image]:
    for name, place in index_tar(path).items():
        if has_image_extension(name):
            assert place.num_bytes is not None, "a member of a tar has a size"
            yield _Image(name, number, place.offset, place.num_bytes)


def _build_lookup(name_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted names with the row of each: all paths, and the file names that are neither a path nor shared by two images."""
    path_K, row_K = np.unique(name_N, return_index=True)
    file_N = pack_names(name.decode().rpartition("/")[2] for name in name_N)
    alone_K, first_K, times_K = np.unique(file_N, return_index=True, return_counts=True)
    is_alias_K = (times_K == 1) & ~np.isin(alone_K, path_K)
    known_K = np.concatenate([path_K, alone_K[is_alias_K]])
    order_K = np.argsort(known_K, kind="stable")
    return known_K[order_K], np.concatenate([row_K, first_K[is_alias_K]])[order_K]
