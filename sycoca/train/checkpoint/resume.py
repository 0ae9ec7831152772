"""Which checkpoint a run continues from. Every rank takes part in reading it through, and all choose the same."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from sycoca.distributed import gather_objects, rank, world_size
from sycoca.log import logger
from sycoca.train.checkpoint.checksums import list_damage
from sycoca.train.checkpoint.mirror import Mirror, fetch_url, is_url, order_candidates
from sycoca.train.checkpoint.saving import point, sweep
from sycoca.types import CheckpointError, ConfigError

Answer = TypeVar("Answer")
_MAX_NAMED = 3


def find_resume(folder: Path, resume: str, *, mirror: Mirror | None = None) -> Path | None:
    """`auto`: this run's last checkpoint, or the mirror's; `none`: start anew; otherwise a checkpoint's path or URL.

    With `auto` a damaged checkpoint is named in the log and the one before it is taken. Raises CheckpointError where there are
    only damaged ones, or the one that was asked for is damaged or absent.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return _find_last(folder, mirror)
    path = Path(resume)
    if is_url(resume):
        path = folder.with_name("resumed") / resume.rstrip("/").rsplit("/", 1)[-1]
        _on_main(partial(_fetch_anew, path, partial(fetch_url, resume)))
    elif not (path / "meta.json").is_file():
        raise CheckpointError(f"run.resume: no checkpoint at {path}; expected `auto`, `none`, a step_... folder or its URL")
    damage = read_through(path)
    if damage:
        raise CheckpointError(f"run.resume: {resume} is damaged: {damage}; name another checkpoint, or use run.resume=auto")
    return path


def read_through(path: Path) -> str:
    """What is wrong with a checkpoint, nothing where it is whole. Each rank reads a share of its files."""
    problems = [one for found in gather_objects(list_damage(path, part=rank(), num_parts=world_size())) for one in found]
    more = f" (and {len(problems) - _MAX_NAMED} more)" if len(problems) > _MAX_NAMED else ""
    return "; ".join(problems[:_MAX_NAMED]) + more


def list_local(folder: Path) -> list[str]:
    """Names of this run's checkpoints, the one to continue from first."""
    if not folder.is_dir():
        return []
    sweep(folder)
    names = [path.name for path in folder.glob("step_*") if path.is_dir()]
    last = (folder / "last").resolve().name if (folder / "last").exists() else None
    return order_candidates(names, last)


def _find_last(folder: Path, mirror: Mirror | None) -> Path | None:
    names = _on_main(lambda: list_local(folder))
    for name in names:
        if not _is_damaged(folder / name):
            return folder / name
    fetched = _find_mirrored(folder, mirror) if mirror is not None else None
    if names and fetched is None:
        raise CheckpointError(f"{folder}: every checkpoint is damaged; restore one, or begin anew with run.resume=none")
    return fetched


def _find_mirrored(folder: Path, mirror: Mirror) -> Path | None:
    names = _on_main(mirror.names)
    for name in names:
        path = folder / name
        _on_main(partial(_fetch_anew, path, partial(mirror.fetch, name)))
        if not _is_damaged(path):
            logger.info("fetched %s from %s", name, mirror.url)
            _on_main(partial(point, folder / "last", path))
            return path
    if names:
        raise CheckpointError(f"{mirror.url}: every checkpoint is damaged; restore one, or begin anew with run.resume=none")
    return None


def _is_damaged(path: Path) -> bool:
    damage = read_through(path)
    if damage:
        logger.warning("%s is damaged and left alone: %s; trying the one before it", path, damage)
    return bool(damage)


def _fetch_anew(target: Path, fetch: Callable[[Path], None]) -> None:
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    fetch(draft)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)


def _on_main(ask: Callable[[], Answer]) -> Answer:
    """The main process's answer, or its error, on every rank."""
    answer, error = None, None
    if rank() == 0:
        try:
            answer = ask()
        except (CheckpointError, ConfigError, OSError) as failed:
            error = failed
    answer, error = gather_objects((answer, error))[0]
    if error is not None:
        raise error
    return answer
