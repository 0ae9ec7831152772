"""Ranks as real processes, forked from a server that has the library imported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from run_worker import Launch, Rank, train_rank

from tests.forks import fork_context, free_port

TIMEOUT = 500


def launch_ranks(launch: Launch, work: Rank = train_rank) -> tuple[list[int | None], list[str]]:
    """The exit status of every rank, and what the ranks say went wrong."""
    context = fork_context()
    launch, failures = replace(launch, port=free_port()), context.SimpleQueue()
    ranks: list[Any] = [context.Process(target=work, args=(number, launch, failures)) for number in range(launch.world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=TIMEOUT)
    for process in ranks:
        process.kill()
    said = []
    while not failures.empty():
        said.append(failures.get())
    return [process.exitcode for process in ranks], said


def train_once(launch: Launch) -> dict[int, dict[str, float]]:
    """A run to its end; its losses by step."""
    statuses, failures = launch_ranks(launch)
    assert statuses == [0] * launch.world, failures
    return losses_by_step(launch.folder)


def losses_by_step(folder: Path) -> dict[int, dict[str, float]]:
    """Every loss and the gradient's norm; a step that was run twice must have given the same bits."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        kept = {name: value for name, value in values.items() if "loss" in name or name == "grad_norm"}
        assert found.setdefault(values["step"], kept) == kept, f"step {values['step']} was not the same the second time"
    return found
