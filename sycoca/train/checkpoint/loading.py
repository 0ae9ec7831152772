"""Checkpoints: weights and their description for everyone, optimiser, random state and data position for resuming.

    checkpoints/step_00000100/
        model.safetensors      every parameter of the task, float32: `model.*` and `objectives.*`
        model.yaml tokenizer/  what `sycoca.load` needs to build the model again
        config.yaml            the whole experiment, resolved
        meta.json              step, pairs seen, metrics, number of processes, engine
        checksums.json         SHA-256 and size of every other file
        state/                 optimiser, random state and data position of every rank; with a running average of the weights
                               (which model.safetensors then holds) also the newest ones
    checkpoints/last -> step_00000100      checkpoints/best -> ...

How they are written: saving.py. Which one a run continues from: resume.py. Every rank must take part in loading one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sycoca.data.elastic import load_positions
from sycoca.distributed import rank, world_size
from sycoca.log import logger
from sycoca.pretrained import load_weights
from sycoca.train.checkpoint.snapshot import NEWEST, set_random_state
from sycoca.train.engine import name_engine
from sycoca.train.loop import TrainState
from sycoca.train.optim import load_optimizer_state
from sycoca.train.trainee import Trainee
from sycoca.types import CheckpointError

PLAIN_ENGINES = {"plain", "DDP", "FSDP2"}
"""They keep one whole optimiser state (put together from FSDP2's shares); each ZeRO stage keeps shares of its own kind."""


def load_checkpoint(path: Path, trainee: Trainee, state: TrainState) -> None:
    """Continue as if never interrupted: weights, optimiser, random state, data position, step.

    Plain PyTorch, DDP and FSDP2 may go on from one another with any number of processes; the data goes on from where all of
    them were (data/elastic.py), with other random numbers.
    Raises CheckpointError where a ZeRO stage does not find its own state for as many processes.
    """
    meta = read_meta(path)
    _check_engine(path, meta, trainee)
    if trainee.is_deepspeed:
        shards = path / "state" / "deepspeed"
        found, _ = trainee.task.load_checkpoint(str(shards))  # pyright: ignore[reportCallIssue]
        if found is None:
            raise CheckpointError(f"DeepSpeed finds nothing of its own in {shards}; use another checkpoint")
    else:
        task: Any = trainee.accelerator.unwrap_model(trainee.task)
        newest = path / "state" / NEWEST if meta["num_averaged"] else path / "model.safetensors"
        load_weights(task, load_file(newest), source=str(path))
        optimizer_state = torch.load(path / "state" / "optimizer.pt", weights_only=True, map_location="cpu")
        load_optimizer_state(trainee.optimizer, optimizer_state)
    if trainee.average is not None:
        if not meta["num_averaged"]:
            raise CheckpointError(f"{path} holds no running average of the weights; set optim.average_decay=0 as it was then")
        trainee.average.load_state_dict(load_file(path / "model.safetensors"), num_updates=meta["num_averaged"])
    state.step, state.num_pairs, state.best = meta["step"], meta["num_pairs"], meta["best"]
    state.positions = load_positions(path / "state", rank(), was_world_size=meta["world_size"], world_size=world_size())
    if state.positions is None:
        logger.warning("%s does not say where all its %d processes were: the data starts anew", path, meta["world_size"])
    random_state = path / "state" / f"random_{rank()}.pt"
    if meta["world_size"] == world_size() and random_state.is_file():
        set_random_state(torch.load(random_state, weights_only=True))
    else:
        logger.warning(
            "%s was written by %d processes and this run has %d: random masks and dropout are others than they would have been",
            path, meta["world_size"], world_size(),
        )  # fmt: skip


def _check_engine(path: Path, meta: dict[str, Any], trainee: Trainee) -> None:
    before = (meta["engine"], meta["world_size"])
    now = (name_engine(trainee.accelerator), world_size())
    if before != now and not {before[0], now[0]} <= PLAIN_ENGINES:
        raise CheckpointError(
            f"{path} was written by {before[0]} on {before[1]} processes and this run is {now[0]} on {now[1]}, which cannot "
            "read its optimiser state; launch as it was launched, or start from its weights in another run.folder with "
            f"init.checkpoint={path}"
        )


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's meta.json."""
    try:
        return json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be resumed: {error}") from error
