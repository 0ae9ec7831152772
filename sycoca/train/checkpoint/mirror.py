"""A second home for checkpoints: any URL that fsspec knows (s3://, gs://, hf://, file://, memory://).

    URL/step_00000100/...      the checkpoint's files; checksums.json goes up last: without it the folder is not whole
    URL/last  URL/best         the names of two of them

Access keys and options are the file system's own matter (its environment variables and configuration files).
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from sycoca.log import logger
from sycoca.train.checkpoint.checksums import CHECKSUMS
from sycoca.types import CheckpointError, ConfigError


def is_url(path: str) -> bool:
    """Whether fsspec, and not the local file system, is meant."""
    return "://" in path


def open_url(url: str, *, setting: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises ConfigError that names the setting."""
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol; one whose package is not installed
        raise ConfigError(f"{setting}: {url} cannot be opened: {error}") from error


class Mirror:
    """Sends whole checkpoints to a URL in the background, the newest first, and fetches them back.

    A checkpoint that could not be sent is a warning, and the next one is sent all the same; the last one must arrive.
    """

    def __init__(self, url: str):
        self.url = url
        self._files, self._root = open_url(url, setting="run.mirror")
        self._threads = ThreadPoolExecutor(1, "mirror")
        self._sending: dict[str, Future[None]] = {}
        self._newest = ""
        self._lock = threading.Lock()

    @property
    def in_use(self) -> frozenset[str]:
        """Names of checkpoints that are waiting or being read."""
        return frozenset(name for name, future in self._sending.items() if not future.done())

    def send(self, path: Path, *, is_best: bool, num_kept: int) -> None:
        """Send a checkpoint in the background; one that waits while a newer one comes is left out unless it is the best."""
        with self._lock:
            self._newest = path.name
        self._sending[path.name] = self._threads.submit(self._send, path, is_best, num_kept)

    def report(self) -> None:
        """Warn of what could not be sent since the last call."""
        for name, future in list(self._sending.items()):
            if future.done() and name != self._newest:
                self._say(name, self._sending.pop(name))

    def wait(self) -> None:
        """Until everything is sent. Raises CheckpointError where the last checkpoint could not be."""
        while self._sending:
            name, future = next(iter(self._sending.items()))
            error = future.exception()
            if error is not None and name == self._newest:
                raise CheckpointError(f"{self.url}/{name} could not be written: {error!r}; the local one is whole") from error
            self._say(name, self._sending.pop(name))

    def names(self) -> list[str]:
        """Of the whole checkpoints, the one to continue from first."""
        if not self._files.isdir(self._root):
            return []
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False)]
        whole = [name for name in names if name.startswith("step_") and self._files.exists(f"{self._root}/{name}/{CHECKSUMS}")]
        return order_candidates(whole, self._read("last"))

    def fetch(self, name: str, target: Path) -> None:
        """Download a checkpoint."""
        fetch_folder(self._files, f"{self._root}/{name}", target)

    def _say(self, name: str, future: "Future[None]") -> None:
        error = future.exception()
        if error is not None:
            logger.warning("mirror: %s/%s could not be written: %r; the next checkpoint will be tried", self.url, name, error)
        else:
            logger.info("mirror: %s/%s", self.url, name)

    def _send(self, path: Path, is_best: bool, num_kept: int) -> None:
        with self._lock:
            is_overtaken = path.name != self._newest and not is_best
        if is_overtaken:
            return
        target = f"{self._root}/{path.name}"
        self._remove(path.name)
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        for name in sorted(names, key=lambda name: name == CHECKSUMS):
            self._files.makedirs(f"{target}/{name}".rsplit("/", 1)[0], exist_ok=True)
            self._files.put_file(str(path / name), f"{target}/{name}")
        self._files.pipe_file(f"{self._root}/last", path.name.encode())
        if is_best:
            self._files.pipe_file(f"{self._root}/best", path.name.encode())
        self._remove_old(num_kept)

    def _remove_old(self, num_kept: int) -> None:
        paths = self._files.ls(self._root, detail=False)
        names = sorted(name for name in (path.rstrip("/").rsplit("/", 1)[-1] for path in paths) if name.startswith("step_"))
        for name in names[: max(0, len(names) - num_kept)]:
            if name not in (self._read("last"), self._read("best")):
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Its checksums first: half a checkpoint must not look whole."""
        folder = f"{self._root}/{name}"
        if self._files.exists(f"{folder}/{CHECKSUMS}"):
            self._files.rm_file(f"{folder}/{CHECKSUMS}")
        if self._files.exists(folder):
            self._files.rm(folder, recursive=True)

    def _read(self, name: str) -> str | None:
        path = f"{self._root}/{name}"
        return self._files.cat_file(path).decode() if self._files.exists(path) else None


def fetch_url(url: str, target: Path) -> None:
    """Download the checkpoint at a URL. Raises CheckpointError where there is none."""
    files, root = open_url(url, setting="run.resume")
    if not files.exists(f"{root.rstrip('/')}/{CHECKSUMS}"):
        raise CheckpointError(f"run.resume: no checkpoint at {url}; expected a step_... folder with {CHECKSUMS} in it")
    fetch_folder(files, root.rstrip("/"), target)


def fetch_folder(files: Any, source: str, target: Path) -> None:
    """Download every file below `source`."""
    for path in files.find(source):
        name = path[path.index(source.lstrip("/")) + len(source.lstrip("/")) :].lstrip("/")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        files.get_file(path, str(target / name))


def order_candidates(names: list[str], last: str | None) -> list[str]:
    """Which checkpoint to continue from first: the last one written, then those before it; all, newest first, without one."""
    steps = sorted(names, reverse=True)
    return [name for name in steps if name <= last] if last is not None and last in names else steps
