"""Transfers of a file from some place on: `http(s)://` by itself, every other URL through fsspec."""

import http.client
import queue
import threading
from collections.abc import Callable
from email.message import Message
from typing import Any, Protocol, TypeVar
from urllib.error import HTTPError
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, Request, build_opener

import fsspec
from pydantic import Field, PositiveFloat

from sycoca.config import Config

_SKIP_BYTES = 1 << 20
_TOO_BUSY = frozenset({408, 425, 429})  # besides 5xx: worth another attempt (RFC 9110, 6585, 8470)
_PARTIAL = 206

Answer = TypeVar("Answer")


class RemoteConfig(Config):
    """How patiently shards elsewhere are read."""

    num_attempts: int = Field(default=6, ge=1)
    """Attempts in a row that bring nothing, before a shard is given up. One that brought anything starts the count again."""
    connect_seconds: PositiveFloat = 10.0
    stall_seconds: PositiveFloat = 30.0
    """A transfer without a byte for so long is broken off."""
    backoff_seconds: PositiveFloat = 0.5
    """The first pause at most; each is twice as long as the one before, half to all of it by chance."""
    max_backoff_seconds: PositiveFloat = 30.0


class RemoteError(OSError):
    """A file elsewhere that could not be read; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, message: str, *, is_final: bool = False):
        super().__init__(message)
        self.reason = reason
        self.is_final = is_final
        """Whether another attempt cannot help."""


class Transfer(Protocol):
    """The bytes of a file from some place on."""

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, where they are known."""
        ...

    @property
    def tag(self) -> str | None:
        """Another when the file has changed, where there is such a thing."""
        ...

    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...


class HttpTransfer:
    """A response, from a place in the file on; where the server takes no ranges, what comes before is read and thrown away."""

    def __init__(self, url: str, place: int, config: RemoteConfig, tag: str | None):
        self._url = url
        headers = {"Range": f"bytes={place}-", **({"If-Range": tag} if tag else {})} if place else {}
        request, seconds = Request(url, headers=headers), config.connect_seconds
        self._response = self._attempt(lambda: _opener(config).open(request, timeout=seconds))
        sent: Message = self._response.headers
        found = sent.get("ETag")
        self.tag = found if found and not found.startswith("W/") else None
        if place and self._response.status == _PARTIAL:
            self.total = _total_of_range(sent.get("Content-Range", ""), place, url)
            return
        self.total = int(sent["Content-Length"]) if sent.get("Content-Length", "").isdigit() else None
        while place and self.tag == tag:
            skipped = self.read(min(place, _SKIP_BYTES))
            if not skipped:
                raise RemoteError("remote_truncated", f"{url}: ended before the place where it had broken off")
            place -= len(skipped)

    def read(self, size: int) -> bytes:
        return self._attempt(lambda: self._response.read1(size))

    def close(self) -> None:
        response = getattr(self, "_response", None)
        if response is not None:
            response.close()

    def _attempt(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except HTTPError as error:
            error.close()
            is_final = error.code < 500 and error.code not in _TOO_BUSY
            reason = "remote_refused" if is_final else "remote_server_error"
            raise RemoteError(reason, f"{self._url}: {error.code} {error.reason}", is_final=is_final) from error
        except (OSError, http.client.HTTPException) as error:
            is_stall = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            raise RemoteError("remote_stalled" if is_stall else "remote_dropped", f"{self._url}: {error}") from error


def _total_of_range(content_range: str, place: int, url: str) -> int | None:
    """Of `bytes 5-9/10`; raises RemoteError where another range came than was asked for."""
    unit, _, rest = content_range.partition(" ")
    span, _, total = rest.partition("/")
    if unit != "bytes" or span.partition("-")[0] != str(place):
        raise RemoteError("remote_server_error", f"{url}: asked for bytes from {place} on, got {content_range!r}")
    return int(total) if total.isdigit() else None


def _opener(config: RemoteConfig) -> OpenerDirector:
    """urllib's, with redirects and proxies, whose connections have one time limit to connect and another between bytes."""

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(config.stall_seconds)

    class SecureConnection(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(config.stall_seconds)

    class Http(HTTPHandler):
        def http_open(self, req: Request) -> Any:
            return self.do_open(Connection, req)

    class Https(HTTPSHandler):
        def https_open(self, req: Request) -> Any:
            return self.do_open(SecureConnection, req)

    return build_opener(Http, Https)


class FileSystemTransfer:
    """A file of any file system that fsspec knows; every call to it has the time limit of a stall."""

    tag: str | None = None

    def __init__(self, url: str, place: int, config: RemoteConfig, tag: str | None):
        assert tag is None, "file systems give no tag"
        self._url, self._seconds = url, config.stall_seconds
        self._file = call_within(lambda: _open_at(url, place), seconds=self._seconds, url=url)
        self.total: int | None = getattr(self._file, "size", None)

    def read(self, size: int) -> bytes:
        return call_within(lambda: self._file.read(size), seconds=self._seconds, url=self._url)

    def close(self) -> None:
        # may wait for a stalled transfer to end: nobody waits for it
        threading.Thread(target=self._file.close, daemon=True).start()


def _open_at(url: str, place: int) -> Any:
    system, path = fsspec.url_to_fs(url)
    file = system.open(path, "rb")
    file.seek(place)
    return file


def call_within(call: Callable[[], Answer], *, seconds: float, url: str) -> Answer:
    """What a file system answers. Raises RemoteError for its errors, and where it takes longer: its thread is then left."""
    answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:  # every file system has its own; they are told in the caller's thread
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise RemoteError("remote_stalled", f"{url}: no answer for {seconds:g} seconds") from None
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ImportError | ValueError):
        raise RemoteError("remote_refused", f"{url}: {error}", is_final=True) from error
    if error is not None:
        raise RemoteError("remote_dropped", f"{url}: {error}") from error
    return answer  # pyright: ignore[reportReturnType]  there is an answer where there is no error
