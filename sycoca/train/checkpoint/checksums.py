"""Whether a checkpoint's files are as they were written: the SHA-256 and size of each, in its checksums.json."""

import hashlib
import json
import os
from pathlib import Path
from typing import TypedDict

CHECKSUMS = "checksums.json"
"""Written last: a folder without it is not whole."""
_BLOCK = 1 << 20


class Checksum(TypedDict):
    """What is known of a file."""

    sha256: str
    size: int


Checksums = dict[str, Checksum]
"""By path below the checkpoint's folder."""


def seal_file(path: Path) -> Checksum:
    """Have the file on the disk, not only in memory, and give its checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return checksum(path)


def checksum(path: Path) -> Checksum:
    """Of the file as it reads now."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return Checksum(sha256=digest.hexdigest(), size=path.stat().st_size)


def write_checksums(folder: Path, known: Checksums) -> None:
    """Write checksums.json for all files of the folder; those that are not `known` yet are read for it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    names = [str(path.relative_to(folder)) for path in files]
    sums = {name: known[name] if name in known else seal_file(path) for name, path in zip(names, files, strict=True)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    seal_file(folder / CHECKSUMS)


def list_damage(folder: Path, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; of `num_parts` equal shares only share number `part`.

    Checkpoints of format 1 had no checksums; of them only meta.json is read.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"meta.json cannot be read ({error})"]
    if meta.get("format") == 1:
        return []
    try:
        sums: Checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        mine = sorted(sums)[part::num_parts]
        return [problem for name in mine for problem in _problems(folder / name, name, sums[name])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a damaged list may hold
        return [f"{CHECKSUMS} cannot be read ({error!r})"]


def _problems(path: Path, name: str, expected: Checksum) -> list[str]:
    if not path.is_file():
        return [f"{name} is missing"]
    if path.stat().st_size != expected["size"]:
        return [f"{name} has {path.stat().st_size} bytes and was written with {expected['size']}"]
    return [] if checksum(path) == expected else [f"{name} is not as it was written (SHA-256 differs)"]
