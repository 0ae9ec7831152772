"""Write WebDataset shards: atomic files, several processes, and a plan by which an interrupted job goes on.

A folder of shards holds `plan.json` (what it is being made from), `<shard>.tar` with `<shard>.stats.json`, and at the end
`index.json` (samples and bytes by shard, and in total) and `bad_rows.tsv` (key, reason) for the rows that gave no sample.
"""

import hashlib
import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track

from sycoca.types import DataError

Job = TypeVar("Job")


class Sample(NamedTuple):
    """One sample: `members` holds the bytes by extension without its leading dot (`jpg`, `json`, `mask.png`)."""

    key: str
    members: Mapping[str, bytes]


class BadRow(NamedTuple):
    """A row of the source that gives no sample, and why; reasons are few, so that they can be counted."""

    key: str
    reason: str


def write_shards(
    folder: Path,
    read_rows: Callable[[Job], Iterable[Sample | BadRow]],
    *,
    jobs: Mapping[str, Job],
    plan: Mapping[str, Any],
    num_processes: int,
    bad_rows: Iterable[BadRow] = (),
) -> dict[str, Any]:
    """Make one shard of each job (name without `.tar` -> argument of `read_rows`), and return what `index.json` says.

    Finished shards are kept. `read_rows` must be a function of a module (it is sent to other processes) and must give the
    same rows each time. `bad_rows` are those found before, listed with the rest. Raises DataError where `folder` was begun
    with another plan, or no job gives a sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _hold_plan(folder, plan)
    pending = {name: job for name, job in jobs.items() if not _is_finished(folder / f"{name}.tar")}
    paths = [folder / f"{name}.tar" for name in pending]
    done = _map_in_processes(partial(_write_shard, read_rows), paths, list(pending.values()), num_processes=num_processes)
    for _ in track(done, "shards", total=len(pending), console=Console(file=sys.stderr), disable=not pending):
        pass
    return _save_index(folder, list(jobs), bad_rows)


def save_text(path: Path, text: str) -> None:
    """Write a whole file or none: a reader never finds half of it."""
    partial_path = path.with_name(f"{path.name}.tmp")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)


def hash_rows(rows: Iterable[Any]) -> str:
    """A fingerprint of JSON-like rows, for plans."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _hold_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    path = folder / "plan.json"
    if not path.exists():
        save_text(path, json.dumps(plan, indent=1))
        return
    found = _read_json(path)
    differing = sorted(name for name in {*plan, *found} if plan.get(name) != found.get(name))
    if differing:
        changes = "; ".join(f"{name}: {found.get(name)!r} there, {plan.get(name)!r} now" for name in differing)
        raise DataError(f"{folder} was begun with another plan ({changes}). Choose another folder, or delete this one")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); delete the folder and make the shards again") from error


def _map_in_processes(
    function: Callable[[Path, Job], None], paths: list[Path], jobs: list[Job], *, num_processes: int
) -> Iterator[None]:
    num_processes = min(num_processes, len(jobs))
    if num_processes <= 1:
        yield from map(function, paths, jobs)
        return
    # spawn: a forked child of a process with threads (torch, the progress bar) can hang
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, paths, jobs)


def _write_shard(read_rows: Callable[[Job], Iterable[Sample | BadRow]], path: Path, job: Job) -> None:
    """The tar gets its name last, so a tar under its final name is whole and has its figures beside it."""
    bad_rows: list[BadRow] = []
    num_samples = 0
    partial_path = path.with_name(f"{path.name}.tmp")
    with tarfile.open(partial_path, "w") as tar:
        for row in read_rows(job):
            if isinstance(row, BadRow):
                bad_rows.append(row)
                continue
            num_samples += 1
            for extension, content in row.members.items():
                _add_member(tar, f"{row.key}.{extension}", content)
    num_bytes = partial_path.stat().st_size if num_samples else 0
    save_text(_stats_path(path), json.dumps({"num_samples": num_samples, "num_bytes": num_bytes, "bad_rows": bad_rows}))
    if num_samples:
        os.replace(partial_path, path)
    else:
        partial_path.unlink()


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner stay 0: the same rows give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _stats_path(shard: Path) -> Path:
    return shard.with_suffix(".stats.json")


def _is_finished(shard: Path) -> bool:
    if not _stats_path(shard).exists():
        return False
    return shard.exists() or _read_json(_stats_path(shard))["num_samples"] == 0


def _save_index(folder: Path, names: list[str], bad_rows: Iterable[BadRow]) -> dict[str, Any]:
    stats = {f"{name}.tar": _read_json(folder / f"{name}.stats.json") for name in names}
    bad = [*map(tuple, bad_rows), *(tuple(row) for shard in stats.values() for row in shard["bad_rows"])]
    save_text(folder / "bad_rows.tsv", "".join(f"{key}\t{reason}\n" for key, reason in [("key", "reason"), *bad]))
    counted = dict(Counter(reason for _, reason in bad))
    index = {
        "num_samples": sum(shard["num_samples"] for shard in stats.values()),
        "num_bytes": sum(shard["num_bytes"] for shard in stats.values()),
        "num_bad_rows": counted,
        "shards": [
            {"name": name, "num_samples": shard["num_samples"], "num_bytes": shard["num_bytes"]}
            for name, shard in stats.items()
            if shard["num_samples"]
        ],
    }
    if not index["num_samples"]:
        raise DataError(f"no good row, so no shard in {folder}: {counted or 'the source is empty'}; see bad_rows.tsv there")
    save_text(folder / "index.json", json.dumps(index, indent=1))
    return index
