"""Shards from elsewhere, kept in a folder of this machine that all its processes share and that never outgrows its limit.

    <what tells the URL>.<CRC-32>.<bytes>.shard      whole files, the time of last use as their time of change
    <what tells the URL>.partial                     a transfer under way, as long as the file will be
    room.lock                                        held while files are counted, take their names or lose them

Whoever reads or writes a file holds a lock on it (flock), which ends with its process: files in use are not removed, and what
a killed process left behind is. The folder must be on a local disk.
"""

import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import PositiveFloat

from sycoca.config import Config
from sycoca.data.remote import RemoteFile, open_remote
from sycoca.data.transfers import RemoteConfig, RemoteError

_BLOCK_BYTES = 1 << 20


class CacheConfig(Config):
    """Where shards from elsewhere are kept, and how much of them."""

    folder: str
    max_gb: PositiveFloat
    """Of 10^9 bytes. Two shards a loader worker at least, or most are read without being kept."""


class Access(NamedTuple):
    """How shards elsewhere are read."""

    remote: RemoteConfig = RemoteConfig()
    cache: CacheConfig | None = None
    seed: str = ""
    """Draws the pauses between attempts: another in every loader worker, or all would come back at once."""


def open_cached(url: str, access: Access) -> tuple[BinaryIO, bool]:
    """The file to read from its beginning, and whether it can seek.

    It is fetched first where it is not kept or was damaged. What has no length, or for which there is no room beside what is
    in use, is a stream that is not kept. Raises RemoteError; every read of a stream may, too.
    """
    stream = open_remote(url, access.remote, seed=access.seed)
    if access.cache is None:
        return stream.buffered(), False  # pyright: ignore[reportReturnType]
    folder, max_bytes = Path(access.cache.folder), int(access.cache.max_gb * 1e9)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(url.encode()).hexdigest()[:24]
    kept = _open_kept(folder, digest)
    if kept is None:
        with _lock_partial(folder / f"{digest}.partial") as partial:
            # another process may have fetched it while this one waited
            kept = _open_kept(folder, digest) or _fetch(stream, Path(partial.name), partial, max_bytes)
    return (stream.buffered(), False) if kept is None else (kept, True)  # pyright: ignore[reportReturnType]


def _open_kept(folder: Path, digest: str) -> BinaryIO | None:
    """The file, locked against removal until it is closed; a damaged one is removed."""
    for path in folder.glob(f"{digest}.*.shard"):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # removed since it was listed
        fcntl.flock(file, fcntl.LOCK_SH)
        _, checksum, size, _ = path.name.split(".")
        if not _is_at(file, path):
            file.close()  # removed before it was locked: it would be kept on disk, and counted by nobody
        elif _checksum(file) == (int(checksum, 16), int(size)):
            os.utime(file.fileno())
            file.seek(0)
            return file
        else:
            with _lock_room(folder), file:
                if _is_at(file, path):  # not what another process has fetched in its place
                    path.unlink()
    return None


def _checksum(file: BinaryIO) -> tuple[int, int]:
    """CRC-32 and number of bytes; reading all of it brings the file into memory, where it is wanted anyway."""
    checksum, size = 0, 0
    while block := file.read(_BLOCK_BYTES):
        checksum, size = zlib.crc32(block, checksum), size + len(block)
    return checksum, size


@contextmanager
def _lock_partial(path: Path) -> Iterator[BinaryIO]:
    """The empty file for a transfer, which nobody else writes; waits for who does."""
    while True:
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # finished or removed while this process waited
            file.truncate(0)
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fetch(stream: RemoteFile, path: Path, file: BinaryIO, max_bytes: int) -> BinaryIO | None:
    """Write the whole stream and open it from its place in the cache; None, with nothing read, where there is no room."""
    stream.connect()
    size = stream.total
    if not size or not _take_room(path, file, size, max_bytes):
        return None
    checksum, place = 0, 0
    with path.open("rb+") as target, stream.buffered() as source:
        while block := source.read(_BLOCK_BYTES):
            target.write(block)
            checksum, place = zlib.crc32(block, checksum), place + len(block)
    if place != size:
        raise RemoteError("remote_truncated", f"{path.stem}: {place} of {size} bytes came")
    final = path.with_name(f"{path.stem}.{checksum:08x}.{size}.shard")
    kept = path.open("rb")
    with _lock_room(path.parent):  # who counts the files finds it under one name or the other
        os.replace(path, final)  # before the lock is let go: who waits for it must not find the name again
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(kept, fcntl.LOCK_SH)
    return kept


@contextmanager
def _lock_room(folder: Path) -> Iterator[None]:
    with (folder / "room.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _take_room(path: Path, file: BinaryIO, size: int, max_bytes: int) -> bool:
    """Make the transfer's file as long as it will be, once what was used longest ago has made room for it."""
    with _lock_room(path.parent):
        found = sorted(_list_files(path.parent), key=lambda item: item[1].st_mtime_ns)
        room = min(max_bytes - sum(status.st_size for _, status in found), shutil.disk_usage(path.parent).free)
        for old, status in found:
            if room >= size:
                break
            if old != path and _remove_unused(old):
                room += status.st_size
        if room < size:
            return False
        file.truncate(size)
        return True


def _list_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for pattern in ("*.shard", "*.partial"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                yield path, path.stat()


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
