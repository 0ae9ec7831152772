"""Files elsewhere as one unbroken stream, over as many transfers as it takes.

A transfer that drops, stalls, ends early or meets a server's error is taken up again where it broke off, after a pause that
doubles each time and is drawn from the seed. Only when nothing comes for several attempts in a row is the file given up.
"""

import io
import time
from collections.abc import Callable
from glob import has_magic
from random import Random
from typing import Any, TypeVar

import fsspec

from sycoca.data.transfers import FileSystemTransfer, HttpTransfer, RemoteConfig, RemoteError, Transfer
from sycoca.types import DataError

_BUFFER_BYTES = 1 << 20

Answer = TypeVar("Answer")


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name and not name.startswith("pipe:")


def expand_url(url: str) -> list[str]:
    """The files that a URL with wildcards matches, in order, or the URL itself; `?` is no wildcard in `http(s)://`.

    Raises DataError where nothing matches, or where what it takes to read such URLs is not installed.
    """
    try:
        is_http = url.startswith(("http://", "https://"))
        if not is_http:
            fsspec.get_filesystem_class(url.partition("://")[0])
        if not ("*" in url if is_http else has_magic(url)):
            return [url]
        system, path = fsspec.url_to_fs(url)
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; pip install 'sycoca[http]' (wildcards), 'sycoca[s3]' or 'sycoca[gcs]'") from error
    except OSError as error:
        raise DataError(f"{url}: cannot be listed ({error}); name the shards with braces, {{00000..00099}}") from error
    if not found:
        raise DataError(f"{url}: no file matches")
    return found


def open_remote(url: str, config: RemoteConfig, *, seed: str) -> "RemoteFile":
    """The file as a stream to read once from its beginning; `seed` draws the pauses. It raises RemoteError when given up."""
    return RemoteFile(url, config, Random(f"{seed}/{url}"))


class RemoteFile(io.RawIOBase):
    """A stream over as many transfers as it takes."""

    def __init__(self, url: str, config: RemoteConfig, generator: Random):
        super().__init__()
        self._url, self._config, self._generator = url, config, generator
        self._place = 0
        self._transfer: Transfer | None = None
        self.total: int | None = None
        """Bytes of the whole file, once a transfer has begun and where the server says."""
        self._tag: str | None = None

    def readable(self) -> bool:
        return True

    def buffered(self) -> io.BufferedReader:
        """The same stream, which gives as many bytes as it is asked for."""
        return io.BufferedReader(self, _BUFFER_BYTES)

    def connect(self) -> None:
        """Begin the transfer, so that `total` is known. Raises RemoteError."""
        self._persist(self._begin)

    def readinto(self, buffer: Any) -> int:
        """Some bytes, 0 at the end."""
        data = self._persist(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._break_off()
        super().close()

    def _persist(self, attempt: Callable[[], Answer]) -> Answer:
        for num_failed in range(1, self._config.num_attempts + 1):
            try:
                return attempt()
            except RemoteError as error:
                self._break_off()
                if error.is_final or num_failed == self._config.num_attempts:
                    raise
            longest = min(self._config.max_backoff_seconds, self._config.backoff_seconds * 2 ** (num_failed - 1))
            time.sleep(longest * self._generator.uniform(0.5, 1))
        raise AssertionError("the last attempt returns or raises")

    def _read(self, size: int) -> bytes:
        if self._place == self.total:  # no transfer for what is all here
            return b""
        transfer = self._begin()
        data = transfer.read(size)
        if not data and self.total is not None and self._place < self.total:
            raise RemoteError("remote_truncated", f"{self._url}: {self._place} of {self.total} bytes came")
        return data

    def _begin(self) -> Transfer:
        if self._transfer is not None:
            return self._transfer
        kind = HttpTransfer if self._url.startswith(("http://", "https://")) else FileSystemTransfer
        transfer = self._transfer = kind(self._url, self._place, self._config, self._tag)
        if self._place and (transfer.total, transfer.tag) != (self.total, self._tag):
            raise RemoteError("remote_changed", f"{self._url}: another file than when reading began", is_final=True)
        self.total, self._tag = transfer.total, transfer.tag
        return transfer

    def _break_off(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
