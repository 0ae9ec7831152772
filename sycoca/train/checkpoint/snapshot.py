"""A checkpoint's content, copied to CPU memory: what a rank is to write, which training no longer changes."""

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sycoca.distributed import rank, whole_on_rank_0, world_size
from sycoca.train.checkpoint.checksums import Checksums, seal_file
from sycoca.train.engine import name_engine
from sycoca.train.loop import TrainState
from sycoca.train.trainee import Trainee
from sycoca.types import CheckpointError

FORMAT = 2
NEWEST = "newest.safetensors"
"""The weights as the last step left them, where the model's are an average."""

Snapshot = dict[str, Callable[[Path], None]]
"""What writes each file, by its path below the checkpoint's folder."""


def take_snapshot(trainee: Trainee, state: TrainState, *, metrics: dict[str, float]) -> Snapshot:
    """This rank's files. Every rank must call it: the weights are gathered under ZeRO-3."""
    weights: Any = trainee.accelerator.get_state_dict(trainee.task)
    files: Snapshot = {}
    if trainee.accelerator.is_main_process:
        whole = {key: _whole(weights[key]) for key in list(weights)}
        if trainee.average is not None:
            files[f"state/{NEWEST}"] = _safetensors(whole)
            whole = whole | {key: _whole(value) for key, value in trainee.average.state_dict().items()}
        files["model.safetensors"] = _safetensors(whole)
        files["meta.json"] = _json(_meta(trainee, state, metrics))
    if trainee.is_deepspeed:
        from sycoca.train.checkpoint.zero_shards import collect_shards  # imports DeepSpeed: slow, and other runs do without

        tag, shards = collect_shards(trainee.task)
        files |= {f"state/deepspeed/{name}": _torch(content) for name, content in shards.items()}
        if trainee.accelerator.is_main_process:
            files["state/deepspeed/latest"] = _text(tag)
    else:
        optimizer_state = whole_on_rank_0(trainee.optimizer.state_dict())
        if trainee.accelerator.is_main_process:
            files["state/optimizer.pt"] = _torch(copy_to_cpu(optimizer_state))
    files[f"state/rank_{rank()}.json"] = _json(state.positions)
    files[f"state/random_{rank()}.pt"] = _torch(random_state())
    return files


def write_snapshot(folder: Path, snapshot: Snapshot) -> Checksums:
    """Write every file, have it on the disk, and give its checksum. Raises CheckpointError that names the file."""
    sums: Checksums = {}
    for name, write in snapshot.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            sums[name] = seal_file(path)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own for OSError
            raise CheckpointError(f"{path} could not be written: {explain(error)}") from error
    return sums


def explain(error: BaseException) -> str:
    """The words of the system's own error where a library has hidden it behind another."""
    cause = error if isinstance(error, OSError) else error.__context__
    return str(cause.strerror) if isinstance(cause, OSError) and cause.strerror else str(error)


def copy_to_cpu(item: Any) -> Any:
    """A deep copy whose tensors are on the CPU and share no memory with the original or one another."""
    if isinstance(item, Tensor):
        return item.detach().to("cpu", copy=True)
    if type(item) in (dict, OrderedDict):
        return type(item)((key, copy_to_cpu(value)) for key, value in item.items())
    if type(item) in (list, tuple):
        return type(item)(copy_to_cpu(value) for value in item)
    return copy.deepcopy(item)


def random_state() -> dict[str, Any]:
    """Of the CPU and of this process's GPUs."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(states: dict[str, Any]) -> None:
    """Go on from `random_state()`."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _meta(trainee: Trainee, state: TrainState, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "format": FORMAT, "step": state.step, "num_pairs": state.num_pairs, "best": state.best, "metrics": dict(metrics),
        "world_size": world_size(), "engine": name_engine(trainee.accelerator),
        "num_averaged": trainee.average.num_updates if trainee.average is not None else 0,
    }  # fmt: skip


def _whole(value: Tensor) -> Tensor:
    """Float32 on the CPU, in memory of its own: tied weights are written under each of their names."""
    value = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    return value.contiguous()


def _safetensors(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


def _json(content: Any) -> Callable[[Path], None]:
    return _text(json.dumps(content, indent=1))


def _text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def _torch(content: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:  # given the path alone, torch hides why a write failed
            torch.save(content, file)

    return write
