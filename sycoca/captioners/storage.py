"""Files of the captioners' parts: tensors with facts beside them, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sycoca.types import DataError

_FACTS = "facts"  # safetensors' own metadata holds text only: one JSON object under this name


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors by name and plain facts into one safetensors file; a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, draft, metadata={_FACTS: json.dumps(facts)})
    os.replace(draft, path)


def load_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises DataError, which calls the file a `kind`, where it is something else."""
    if not path.is_file():
        raise DataError(f"{path}: no such {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a {kind} ({error!r}); make it again") from error
    if facts.get("kind") != kind:
        raise DataError(f"{path}: expected a {kind}, found {facts.get('kind')!r}")
    return tensors, facts


def read_facts(path: Path, *, kind: str) -> dict[str, Any]:
    """A JSON object of plain facts that says it is a `kind`. Raises DataError where it is something else."""
    if not path.is_file():
        raise DataError(f"{path.parent}: no {kind} there ({path.name} is missing)")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); make the {kind} again") from error
    if facts.get("kind") != kind:
        raise DataError(f"{path}: expected a {kind}, found {facts.get('kind')!r}")
    return facts
