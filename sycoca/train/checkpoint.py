"""Checkpoints: weights and their description for everyone, optimiser, random state and data position for resuming.

    checkpoints/step_00000100/
        model.safetensors      every parameter of the task, float32: `model.*` and `objectives.*`
        model.yaml tokenizer/  what `sycoca.load` needs to build the model again
        config.yaml            the whole experiment, resolved
        meta.json              step, pairs seen, metrics, number of processes, engine
        state/                 optimiser, random state and data position of every rank; with a running average of the weights
                               (which model.safetensors then holds) also the newest ones
    checkpoints/last -> step_00000100      checkpoints/best -> ...

A checkpoint is written under a temporary name and renamed when it is whole. Every rank must take part.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from sycoca.distributed import barrier, rank, whole_on_rank_0, world_size
from sycoca.log import logger
from sycoca.pretrained import load_weights
from sycoca.train.average import WeightAverage
from sycoca.train.engine import name_engine
from sycoca.train.loop import TrainState
from sycoca.train.optim import load_optimizer_state
from sycoca.types import CheckpointError

FORMAT = 1
NEWEST = "newest.safetensors"
"""The weights as the last step left them, where the model's are an average."""
PLAIN_ENGINES = {"plain", "DDP", "FSDP2"}
"""They keep one whole optimiser state (put together from FSDP2's shares); each ZeRO stage keeps shares of its own kind."""


@dataclass
class Trainee:
    """What is being trained, after `accelerator.prepare`."""

    accelerator: Accelerator
    task: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed keeps the optimiser's state, in files of its own."""
        return self.accelerator.state.deepspeed_plugin is not None


def save_checkpoint(folder: Path, trainee: Trainee, state: TrainState, *, describe: Any, metrics: dict[str, float]) -> Path:
    """Write `folder/step_...` and point `folder/last` at it. `describe(path)` writes the model's and run's description."""
    target = folder / f"step_{state.step:08d}"
    draft = folder / f".{target.name}.partial"
    is_main = trainee.accelerator.is_main_process
    if is_main:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "state").mkdir(parents=True)
    barrier()
    weights: Any = trainee.accelerator.get_state_dict(trainee.task)  # a gather under ZeRO-3: all ranks
    if is_main:
        whole = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        whole = {k: v.float() if v.is_floating_point() else v for k, v in whole.items()}
        if trainee.average is not None:
            save_file(whole, draft / "state" / NEWEST)
            whole |= {k: v.cpu().contiguous() for k, v in trainee.average.state_dict().items()}
        save_file(whole, draft / "model.safetensors")
        describe(draft)
        meta = {"format": FORMAT, "step": state.step, "num_pairs": state.num_pairs, "best": state.best, "metrics": metrics,
                "world_size": world_size(), "engine": name_engine(trainee.accelerator),
                "num_averaged": trainee.average.num_updates if trainee.average is not None else 0}  # fmt: skip
        (draft / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    _save_resume_state(draft / "state", trainee, state)
    barrier()
    if is_main:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(draft, target)
        point(folder / "last", target)
    barrier()
    return target


def load_checkpoint(path: Path, trainee: Trainee, state: TrainState) -> None:
    """Continue as if never interrupted: weights, optimiser, random state, data position, step.

    Plain PyTorch, DDP and FSDP2 may go on from one another with any number of processes; the data then starts anew.
    Raises CheckpointError where a ZeRO stage does not find its own state for as many processes.
    """
    meta = read_meta(path)
    _check_engine(path, meta, trainee)
    if trainee.is_deepspeed:
        trainee.task.load_checkpoint(str(path / "state" / "deepspeed"))  # pyright: ignore[reportCallIssue]
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
    mine = path / "state" / f"rank_{rank()}.json"
    if meta["world_size"] == world_size() and mine.is_file():
        state.positions = json.loads(mine.read_text(encoding="utf-8"))
        _set_random_state(torch.load(path / "state" / f"random_{rank()}.pt", weights_only=True))
    else:
        logger.warning(
            "%s was written by %d processes and this run has %d: the data starts from the beginning, with another random state",
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


def find_resume(folder: Path, resume: str) -> Path | None:
    """`auto`: the last checkpoint of this run if there is one; `none`: start anew; otherwise a checkpoint's path."""
    if resume == "none":
        return None
    if resume == "auto":
        last = folder / "last"
        return last.resolve() if (last / "meta.json").is_file() else None
    path = Path(resume)
    if not (path / "meta.json").is_file():
        raise CheckpointError(f"run.resume: no checkpoint at {path}; expected `auto`, `none` or a step_... folder")
    return path


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target` beside it, in one step."""
    draft = link.with_name(f".{link.name}.partial")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    os.replace(draft, link)


def remove_old(folder: Path, num_kept: int) -> None:
    """Keep the newest `num_kept` checkpoints and the best one."""
    kept = {(folder / name).resolve() for name in ("last", "best")}
    steps = sorted(folder.glob("step_*"))
    for path in steps[: max(0, len(steps) - num_kept)]:
        if path.resolve() not in kept:
            shutil.rmtree(path)


def _save_resume_state(folder: Path, trainee: Trainee, state: TrainState) -> None:
    if trainee.is_deepspeed:
        trainee.task.save_checkpoint(str(folder / "deepspeed"))  # pyright: ignore[reportCallIssue]
    else:
        optimizer_state = whole_on_rank_0(trainee.optimizer.state_dict())
        if trainee.accelerator.is_main_process:
            torch.save(optimizer_state, folder / "optimizer.pt")
    (folder / f"rank_{rank()}.json").write_text(json.dumps(state.positions), encoding="utf-8")
    torch.save(_random_state(), folder / f"random_{rank()}.pt")


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
