"""Writing checkpoints: training waits for the copy to CPU memory, a thread writes, and every rank agrees before it counts.

A checkpoint is written under a temporary name, has its checksums written last, and is renamed when every rank's files are on
the disk. What ends a save on the way leaves the checkpoints before it as they were.
"""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sycoca.distributed import gather_objects
from sycoca.train.checkpoint.checksums import Checksums, write_checksums
from sycoca.train.checkpoint.snapshot import explain, take_snapshot, write_snapshot
from sycoca.train.loop import TrainState
from sycoca.train.trainee import Trainee
from sycoca.types import CheckpointError


class Saver:
    """Saves one checkpoint at a time. Every rank must call `begin` and `finish`, in the same order.

    `describe(path)` writes the description of model and run. In the background a thread of each rank writes; otherwise `begin`
    itself does.
    """

    def __init__(self, folder: Path, trainee: Trainee, describe: Callable[[Path], None], *, is_background: bool):
        self.folder, self.trainee, self._describe = folder, trainee, describe
        self._threads = ThreadPoolExecutor(1, "checkpoint") if is_background else None
        self._writing: Future[Checksums] | None = None
        self._target = folder
        self._is_main = trainee.accelerator.is_main_process
        self.seconds_waited = 0.0
        """How long training stood still for the checkpoint saved last."""
        if self._is_main and folder.is_dir():
            sweep(folder)

    @property
    def is_background(self) -> bool:
        """Whether training goes on while files are written."""
        return self._threads is not None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and not finished."""
        return self._writing is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._writing is not None and not self._writing.done()

    def begin(self, state: TrainState, *, metrics: dict[str, float]) -> None:
        """Copy everything to CPU memory and start to write `folder/step_...`. Raises CheckpointError on every rank."""
        assert not self.is_pending, "finish the checkpoint before"
        started = time.perf_counter()
        self._target = self.folder / f"step_{state.step:08d}"
        draft = self._draft
        _agree(_attempt(draft, lambda: _make_anew(draft)) if self._is_main else None)
        snapshot = take_snapshot(self.trainee, state, metrics=metrics)

        def write() -> Checksums:
            if self._is_main:
                self._describe(draft)
            return write_snapshot(draft, snapshot)

        self._writing = self._threads.submit(write) if self._threads is not None else _done(write)
        self.seconds_waited = time.perf_counter() - started

    def finish(self) -> Path:
        """Wait until every rank has written, and make the checkpoint count: `folder/last` points to it.

        Raises CheckpointError on every rank, with the path that could not be written; the checkpoints before are as they were.
        """
        assert self._writing is not None, "begin a checkpoint first"
        started, writing, self._writing = time.perf_counter(), self._writing, None
        sums: Checksums = {}
        error = _attempt(self._draft, lambda: sums.update(writing.result()))
        everyone: list[Checksums] = gather_objects(sums)
        try:
            _agree(error)
            known = {name: one for of_rank in everyone for name, one in of_rank.items()}
            _agree(_attempt(self._draft, lambda: publish(self._draft, self._target, known)) if self._is_main else None)
        except CheckpointError as failed:
            if self._is_main:
                shutil.rmtree(self._draft, ignore_errors=True)
            raise CheckpointError(f"{failed}; {_describe_last(self.folder)}") from failed
        self.seconds_waited += time.perf_counter() - started
        return self._target

    @property
    def _draft(self) -> Path:
        return self.folder / f".{self._target.name}.partial"


def publish(draft: Path, target: Path, known: Checksums) -> None:
    """Give a whole checkpoint its name and point `last` at it; one of the same name makes room in that moment, not before."""
    write_checksums(draft, known)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    os.replace(draft, target)
    point(target.with_name("last"), target)
    _sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half done."""
    for replaced in folder.glob(".step_*.replaced"):
        target = folder / replaced.name[1:].removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, target)
    for draft in folder.glob(".step_*.partial"):
        shutil.rmtree(draft)


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target` beside it, in one step."""
    draft = link.with_name(f".{link.name}.partial")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    os.replace(draft, link)


def remove_old(folder: Path, num_kept: int, *, in_use: frozenset[str] = frozenset()) -> None:
    """Keep the newest `num_kept` checkpoints, the last and the best one, and those whose names are in use."""
    kept = {(folder / name).resolve().name for name in ("last", "best")} | in_use
    steps = sorted(folder.glob("step_*"))
    for path in steps[: max(0, len(steps) - num_kept)]:
        if path.name not in kept:
            shutil.rmtree(path)


def _attempt(path: Path, action: Callable[[], object]) -> str | None:
    """Why it failed, naming a path; None where it did not."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or path} could not be written: {explain(error)}"
    return None


def _agree(error: str | None) -> None:
    """Raise the first rank's error on all of them: a rank that went on alone would wait for the others for ever."""
    errors = [one for one in gather_objects(error) if one is not None]
    if errors:
        raise CheckpointError(errors[0])


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)


def _done(write: Callable[[], Checksums]) -> Future[Checksums]:
    future: Future[Checksums] = Future()
    try:
        future.set_result(write())
    except (CheckpointError, OSError) as error:
        future.set_exception(error)
    return future


def _describe_last(folder: Path) -> str:
    last = folder / "last"
    good = f"{last.resolve()} is the last good checkpoint" if last.exists() else "there is no checkpoint before it"
    return f"{good}; make room or repair the file system, and start the run again"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
