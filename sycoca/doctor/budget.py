"""Memory a device and time to the end, from a few real steps; disk for the checkpoints."""

import shutil
import statistics
import time
from collections.abc import Iterable
from datetime import timedelta
from itertools import islice, pairwise
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from sycoca.doctor.launch_file import Launch
from sycoca.doctor.report import Check, grade, judge
from sycoca.train.loop import StepReport, TrainState, to_device, train
from sycoca.train.optim import build_optimizer
from sycoca.train.pretrain import PretrainConfig
from sycoca.train.task import PretrainTask
from sycoca.types import Batch

NUM_STEPS = 4
"""Real steps that are timed; the first is not counted."""
TRIAL_PAIRS = 8
_MOST_SECONDS_A_STEP = 20.0
"""A whole batch that would take longer is not run: the trial's time is multiplied."""
_FLOAT = 4
_ROOMY, _FULL = 0.9, 1.0
_MAX_WAIT_SHARE = 0.2
_GIB = 2**30


def check_budget(
    task: PretrainTask, batches: Iterable[Batch], config: PretrainConfig, accelerator: Accelerator, launch: Launch
) -> tuple[list[Check], dict[str, float]]:
    """Findings about memory, time and disk, and their numbers. Trains `task` by a few steps."""
    batch = next(iter(batches))
    num_bytes, activation = state_bytes(task, config, launch), activation_bytes(task, batch, config, accelerator.device)
    memory = check_memory(num_bytes + activation, activation, accelerator.device)
    figures = {"memory_gib": (num_bytes + activation) / _GIB, "activation_gib": activation / _GIB}
    if memory.status == "wrong":
        return [memory], figures
    seconds, wait_share, is_whole = time_steps(task, batches, config, accelerator)
    hours = seconds * config.optim.num_steps / 3600
    figures |= {"seconds_per_step": seconds, "hours": hours, "wait_share": wait_share}
    found = [memory, _check_time(seconds, is_whole, config), _check_wait(wait_share)]
    return [*found, _check_checkpoints(task, seconds, config)], figures


def state_bytes(task: PretrainTask, config: PretrainConfig, launch: Launch) -> float:
    """Weights, gradients and AdamW's two moments on one device, float32; ZeRO adds a master copy and splits by its stage.

    FSDP2 splits all of it and adds none. What is offloaded is not on the device.
    """
    num_trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    num_fixed = sum(parameter.numel() for parameter in task.parameters()) - num_trained
    share = 1 / launch.num_processes
    weights = share if launch.splits_weights else 1.0
    gradients = share if launch.zero_stage >= 2 or launch.is_fsdp else 1.0
    moments = 2 * share if launch.is_fsdp else (2 + 1) * share if launch.zero_stage else 2.0
    moments = 0.0 if launch.is_offloaded else moments
    average = 1.0 if config.optim.average_decay else 0.0
    return _FLOAT * (num_trained * (weights + gradients + moments + average) + num_fixed * weights)


def activation_bytes(task: PretrainTask, batch: Batch, config: PretrainConfig, device: torch.device) -> float:
    """What autograd keeps of a forward pass over one batch (of one chunk where there are several).

    A line through two small parts of the batch: some of it (the vocabulary's gradient) does not grow with the pairs.
    """
    most = len(take_first(batch, TRIAL_PAIRS)["key"])
    sizes = (max(1, most // 2), most)
    small, large = (saved_bytes(task, to_device(take_first(batch, size), device)) for size in sizes)
    a_pair = (large - small) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else large / most
    return large + a_pair * (config.data.batch_size / config.optim.num_chunks - most)


def saved_bytes(task: PretrainTask, batch: Batch) -> float:
    """The tensors that a forward pass of the whole batch saves, each storage once and parameters not at all."""
    own = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_chunked, task.num_chunks = task.num_chunks, 1
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task(batch)[0]  # alive until the end: a freed storage's address would be taken by another
    task.num_chunks = was_chunked
    del loss
    return float(sum(kept.values()))


def take_first(batch: Batch, num: int) -> Batch:
    """The batch's first pairs."""
    return Batch(
        image=batch["image"][:num], token=batch["token"][:num], length=batch["length"][:num], key=batch["key"][:num],
        position=batch["position"],
    )  # fmt: skip


def check_memory(num_bytes: float, activation: float, device: torch.device) -> Check:
    """The estimate against what the device has."""
    room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    says = f"about {num_bytes / _GIB:.2f} of {room / _GIB:.0f} GiB a {device.type} device"
    says += f", {activation / _GIB:.2f} of them for activations"
    mend = "lower data.batch_size, raise optim.num_chunks, set model.recompute=true, or launch a higher ZeRO stage"
    return judge("memory", grade(num_bytes / room, warn_above=_ROOMY, wrong_above=_FULL), says, mend)


def time_steps(
    task: PretrainTask, batches: Iterable[Batch], config: PretrainConfig, accelerator: Accelerator
) -> tuple[float, float, bool]:
    """Seconds a step, the share of waiting for data, and whether whole batches were run."""
    size = config.data.batch_size
    trial = max(config.optim.num_chunks, TRIAL_PAIRS // config.optim.num_chunks * config.optim.num_chunks)
    if trial < size:
        seconds, _ = _run(task, (take_first(batch, trial) for batch in batches), config, accelerator)
        if seconds * size / trial > _MOST_SECONDS_A_STEP:
            return seconds * size / trial, 0.0, False
    return *_run(task, batches, config, accelerator), True


def _run(
    task: PretrainTask, batches: Iterable[Batch], config: PretrainConfig, accelerator: Accelerator
) -> tuple[float, float]:
    plan = config.optim.model_copy(update={"num_steps": NUM_STEPS})
    ends, waits = [], []

    def note(report: StepReport) -> None:
        report.metrics["loss"].item()  # a GPU's work is done when its numbers are there
        ends.append(time.perf_counter())
        waits.append(report.wait_seconds)

    stream = islice(iter(batches), NUM_STEPS)
    train(task, stream, build_optimizer(task, plan), accelerator=accelerator, plan=plan, state=TrainState(), hooks=[note])
    seconds = [end - start for start, end in pairwise(ends)]
    return statistics.median(seconds), sum(waits[1:]) / sum(seconds)


def _check_time(seconds: float, is_whole: bool, config: PretrainConfig) -> Check:
    whole = timedelta(seconds=round(seconds * config.optim.num_steps))
    how = "measured" if is_whole else f"from steps of {TRIAL_PAIRS} pairs"
    says = f"{seconds:.2f} s a step ({how}), {whole} for optim.num_steps = {config.optim.num_steps}"
    return Check("time", "ok", f"{says}, beside evaluation and saving, if every process is as fast as this one")


def _check_wait(wait_share: float) -> Check:
    says = f"{wait_share:.0%} of a step is waiting for data"
    mend = "raise data.num_workers, or store smaller images (tools/make_shards.py --resize)"
    return judge("waiting for data", grade(wait_share, warn_above=_MAX_WAIT_SHARE), says, mend)


def _check_checkpoints(task: PretrainTask, seconds: float, config: PretrainConfig) -> Check:
    """Weights and both moments a checkpoint; one more than is kept is on the disk while it is written, and the best one."""
    num = config.run.num_kept + 2
    needed = num * (1 + 2) * _FLOAT * sum(parameter.numel() for parameter in task.parameters())
    folder = Path(config.run.folder).resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    minutes = seconds * config.run.checkpoint_every / 60
    says = f"{num} checkpoints need {needed / _GIB:.2f} GiB, {free / _GIB:.0f} GiB are free; one every {minutes:.0f} minutes"
    mend = "free some disk, choose another run.folder, or lower run.num_kept"
    return judge("checkpoints", grade(needed / max(free, 1), warn_above=_ROOMY, wrong_above=_FULL), says, mend)
