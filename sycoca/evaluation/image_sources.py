"""Labelled images from a folder `<root>/<class>/<file>`, a tar of that layout, or shards whose samples carry their label."""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypedDict

import torch
from PIL import Image
from torch import Tensor

from sycoca.data.classes import choose_label
from sycoca.data.decode import IMAGE_EXTENSIONS, SampleError, decode_image
from sycoca.data.shards import expand_shards
from sycoca.types import DataError

_MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs
_MAX_BYTES = 1 << 28


class LabelledImage(NamedTuple):
    """`label` is a class's name (a folder's name as it stands) or its number."""

    image: Image.Image
    label: str | int
    key: str


class LabelledBatch(TypedDict):
    """Input of the zero-shot evaluator."""

    image: Tensor
    """BCHW float32, normalised."""
    label: Tensor
    """B int64, places in the list of classes."""


class _Entry(NamedTuple):
    key: str
    label: str | int
    read: Callable[[], bytes]


def labelled_images(sources: Sequence[str], *, rank: int = 0, world_size: int = 1) -> Iterator[LabelledImage]:
    """Every `world_size`-th image from number `rank` on; others are not read.

    A source is a folder of class folders, a tar, a folder of tars, or a pattern with braces. In a tar a sample's label is its
    json's `class_name` or `label`, else its `.cls`, else the folder it lies in. Raises DataError for a source without images,
    a class folder without images, a sample without a label, an image that cannot be read.
    """
    for entry in islice(_list_entries(sources), rank, None, world_size):
        yield LabelledImage(_decode(entry.read(), entry.key), entry.label, entry.key)


def list_labels(sources: Sequence[str]) -> list[str | int]:
    """The different labels, names in alphabetical order before numbers; images are not read. Raises DataError."""
    labels = {entry.label for entry in _list_entries(sources)}
    if not labels:
        raise DataError(f"{', '.join(sources)}: no labelled image found")
    return sorted(labels, key=lambda label: (isinstance(label, int), label))


def read_image(path: Path) -> Image.Image:
    """An upright RGB image. Raises DataError with the path where there is none, or it is damaged."""
    if not path.is_file():
        raise DataError(f"{path}: no such image")
    return _decode(path.read_bytes(), str(path))


def batch_images(
    images: Iterable[LabelledImage],
    transform: Callable[[Image.Image], Tensor],
    *,
    places: dict[str | int, int],
    batch_size: int,
) -> Iterator[LabelledBatch]:
    """Transformed images with `places[label]` as labels; the last batch may be smaller."""
    rows = ((transform(row.image), places[row.label]) for row in images)
    while batch := list(islice(rows, batch_size)):
        images_CHW, labels = zip(*batch, strict=True)
        yield LabelledBatch(image=torch.stack(images_CHW), label=torch.tensor(labels))


def _decode(data: bytes, key: str) -> Image.Image:
    try:
        return decode_image(data, max_pixels=_MAX_PIXELS, max_bytes=_MAX_BYTES, draft_size=0)
    except SampleError as error:
        raise DataError(f"{key}: the image cannot be read ({error.reason}); repair or remove it") from error


def _list_entries(sources: Sequence[str]) -> Iterator[_Entry]:
    for source in sources:
        root = Path(source)
        if root.is_dir() and not any(root.glob("*.tar")):
            yield from _list_folder(root)
            continue
        for shard in expand_shards([source], allow_pipe=False):
            yield from _list_tar(Path(shard))


def _list_folder(root: Path) -> Iterator[_Entry]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if not folders:
        raise DataError(f"{root}: expected class folders with images, or *.tar shards, found neither")
    for folder in folders:
        paths = sorted(path for path in folder.iterdir() if _extension(path.name) in IMAGE_EXTENSIONS)
        if not paths:
            raise DataError(f"{folder}: a class folder without images ({', '.join(IMAGE_EXTENSIONS)}); remove it or fill it")
        for path in paths:
            yield _Entry(str(path), folder.name, path.read_bytes)


def _list_tar(path: Path) -> Iterator[_Entry]:
    """Samples in the order of their first members; the tar must be a file here, since members are read out of order."""
    if not path.is_file():
        raise DataError(f"{path}: labelled images are read from local files; copy the shard here")
    try:
        with tarfile.open(path) as tar:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for info in tar:
                member = PurePosixPath(info.name)
                stem, _, extension = member.name.partition(".")
                if info.isfile() and stem:
                    samples.setdefault(str(member.with_name(stem)), {})[extension.lower()] = info
            for key, members in samples.items():
                image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
                if image is not None:
                    texts = {name: _read_member(tar, members[name]) for name in ("json", "cls") if name in members}
                    label = choose_label(texts, key, where=f"{path}:{key}")
                    yield _Entry(f"{path}:{key}", label, partial(_read_member, tar, image))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar file ({error}); copy or make it again") from error


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None, f"{info.name} is listed as a file"
    try:
        return file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{tar.name}: {info.name} cannot be read ({error}); copy or make the tar again") from error


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()
