"""Shards, that is tar files, to raw samples: complete groups of bytes with one key, and a count of what was left out."""

import glob
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from gzip import BadGzipFile
from lzma import LZMAError
from pathlib import Path
from tarfile import EmptyHeaderError, InvalidHeaderError, ReadError, TruncatedHeaderError  # pyright: ignore
from typing import Any, NamedTuple

from braceexpand import braceexpand
from webdataset.gopen import gopen

from sycoca.data.cache import Access, open_cached
from sycoca.data.decode import IMAGE_EXTENSIONS, TEXT_EXTENSIONS
from sycoca.data.position import DropLog
from sycoca.data.remote import expand_url, is_remote
from sycoca.data.transfers import RemoteError
from sycoca.types import DataError

_MAX_TEXT_BYTES = 1 << 20
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^./][^.]*)[.]([^/]*)$")  # webdataset's rule: split at the name's first dot
_STREAM_BLOCK = 1 << 20
LOCAL = Access()
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError)


class RawSample(NamedTuple):
    """An image and its text as they lie in the shard."""

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def image(self) -> bytes:
        return next(self.members[name] for name in IMAGE_EXTENSIONS if name in self.members)


def expand_shards(shards: list[str], *, allow_pipe: bool) -> list[str]:
    """Every shard named: braces are expanded, a folder gives its *.tar in order, wildcards what they match (in URLs too).

    Raises DataError for a shard or folder that is not there, and for `pipe:` unless it is allowed.
    """
    found = [path for pattern in shards for name in braceexpand(pattern) for path in _expand_one(name, allow_pipe)]
    if not found:
        raise DataError("data.shards: expected at least one shard, found none; name tar files, a folder of them, or a pattern")
    return found


def read_samples(
    shard: str, drops: DropLog, *, max_bytes: int, is_mine: Callable[[], bool], access: Access = LOCAL
) -> Iterator[RawSample]:
    """Complete pairs of one shard, in order; `is_mine` is asked once for each key, and other samples are not read.

    A shard that breaks off gives what could be read, and is counted. Images above `max_bytes` are never read into memory.
    """
    seen: set[str] = set()
    for group in _read_groups(shard, drops, max_bytes=max_bytes, is_mine=is_mine, access=access):
        reason = "duplicate_key" if group.key in seen else _what_is_missing(group.members)
        seen.add(group.key)
        if reason:
            drops.add(reason, shard)
        else:
            yield RawSample(group.key, shard, group.members)


def _expand_one(name: str, allow_pipe: bool) -> list[str]:
    if name.startswith("pipe:"):
        if not allow_pipe:
            raise DataError(f"{name}: a shard that runs a command; set data.allow_pipe=true if you trust it")
        return [name]
    if is_remote(name):
        return expand_url(name)
    if Path(name).is_dir():
        found = sorted(str(path) for path in Path(name).glob("*.tar"))
        hint = "a folder without *.tar; name one with shards"
    elif glob.has_magic(name):
        found, hint = sorted(glob.glob(name)), "no file matches"
    else:
        found, hint = [name] if Path(name).is_file() else [], "no such shard or folder; check the path in data.shards"
    if not found:
        raise DataError(f"{name}: {hint}")
    return found


def _what_is_missing(members: dict[str, bytes]) -> str | None:
    """Why the group is no pair. A member that was not read was too large."""
    for name, data in members.items():
        if data is _TOO_LARGE:
            return "image_too_many_bytes" if name in IMAGE_EXTENSIONS else "caption_too_many_bytes"
    if members.keys().isdisjoint(IMAGE_EXTENSIONS):
        return "missing_image"
    return "missing_caption" if members.keys().isdisjoint(TEXT_EXTENSIONS) else None


_TOO_LARGE = b"too large"  # known by identity: stands for a member that was not read


class _Group:
    """Members that follow each other with one key."""

    def __init__(self, key: str, is_mine: bool):
        self.key = key
        self.is_mine = is_mine
        self.extensions: set[str] = set()
        self.members: dict[str, bytes] = {}


def _read_groups(
    shard: str, drops: DropLog, *, max_bytes: int, is_mine: Callable[[], bool], access: Access
) -> Iterator[_Group]:
    """This worker's groups; a member name that comes again begins another group with the same key."""
    limits = {**dict.fromkeys(IMAGE_EXTENSIONS, max_bytes), **dict.fromkeys(TEXT_EXTENSIONS, _MAX_TEXT_BYTES)}
    group = _Group("", False)
    try:
        for key, extension, read in _read_members(shard, access):
            if key != group.key or extension in group.extensions:
                if group.is_mine:
                    yield group
                group = _Group(key, is_mine())
            group.extensions.add(extension)
            if group.is_mine and extension in limits:
                group.members[extension] = read(limits[extension])
    except _READ_ERRORS as error:
        drops.add(_name_error(error), shard)
        drops.judge_shard(shard, is_lost=isinstance(error, RemoteError))
    else:
        drops.judge_shard(shard, is_lost=False)
    if group.is_mine:
        yield group


def _read_members(shard: str, access: Access) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    """Key, extension and reader (given a limit in bytes) of each file; a reader works until the next one is asked for."""
    with _open_tar(shard, access) as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # pyright: ignore  tarfile remembers every member it has seen
            found = _KEY_AND_EXTENSION.match(info.name)
            if found and info.isreg():
                yield found[1], found[2].lower(), partial(_read_data, tar, info)


def _read_data(tar: tarfile.TarFile, info: tarfile.TarInfo, limit: int) -> bytes:
    if info.size > limit:
        return _TOO_LARGE
    file = tar.extractfile(info)
    assert file is not None, "a regular file has data"
    data = file.read()
    if len(data) < info.size:
        raise ReadError("unexpected end of data")
    return data


class _CorruptTar(ReadError):
    """Bytes that are no tar header where there should be one."""


class _StrictTarInfo(tarfile.TarInfo):
    """Reads headers as tarfile does, but a damaged one in the middle is an error: tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile)
        except (EmptyHeaderError, TruncatedHeaderError) as error:
            raise ReadError("unexpected end of data") from error
        except InvalidHeaderError as error:
            raise _CorruptTar(str(error)) from error


@contextmanager
def _open_tar(shard: str, access: Access) -> Iterator[tarfile.TarFile]:
    """What can seek is read with seeks, so that what is not wanted costs nothing; all else is a stream."""
    if shard.endswith(".tar") and "://" not in shard and not shard.startswith("pipe:"):
        with tarfile.open(shard, "r:", tarinfo=_StrictTarInfo) as tar:
            yield tar
        return
    found, can_seek = open_cached(shard, access) if is_remote(shard) else (gopen(shard, "rb"), False)
    stream: Any = found
    mode = "r:" if can_seek and shard.endswith(".tar") else "r|*"
    with closing(stream), tarfile.open(fileobj=stream, mode=mode, bufsize=_STREAM_BLOCK, tarinfo=_StrictTarInfo) as tar:
        yield tar


def _name_error(error: BaseException) -> str:
    if isinstance(error, RemoteError):
        return error.reason
    if isinstance(error, _CorruptTar | zlib.error | LZMAError | BadGzipFile):
        return "corrupt_tar"
    if isinstance(error, tarfile.TarError | EOFError):
        return "truncated_tar"
    return "unreadable_tar"
