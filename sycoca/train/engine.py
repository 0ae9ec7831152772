"""Accelerate and DeepSpeed: what runs, and where each number of the engine's own configuration comes from."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from sycoca.types import ConfigError


def build_accelerator(clip_norm: float, *, batch_size: int) -> Accelerator:
    """The accelerator of this launch. Precision is the task's own matter, so the engines keep float32 parameters.

    Under DeepSpeed the JSON of the launch file holds ZeRO settings only; batch size and clipping are written into it here.
    """
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    is_launched = "LOCAL_RANK" in os.environ  # how torchrun and accelerate tell a process that it belongs to a group
    if is_launched and not torch.cuda.is_available():
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": batch_size,
            "train_batch_size": batch_size * accelerator.num_processes,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm,
            "steps_per_print": 2**31,
        }
        # a checkpoint gathers whole weights (float32 here, whatever the option's name says); ZeRO-3 refuses without it
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return accelerator


def prepare(
    accelerator: Accelerator, task: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The task and its optimiser in the engine's hands. The loader and the schedule stay out (design: they go wrong there)."""
    return accelerator.prepare(task, optimizer)


def describe_engine(accelerator: Accelerator, precision: str, *, batch_size: int) -> str:
    """The first line of a run: what was really launched."""
    asked_for = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if asked_for and accelerator.state.deepspeed_plugin is None:
        raise ConfigError("the launch file asks for DeepSpeed but it is not running; unset ACCELERATE_USE_CPU and launch again")
    num = accelerator.num_processes
    return (
        f"engine {name_engine(accelerator)}, {num} process{'es' if num > 1 else ''} on {accelerator.device.type}, {precision}, "
        f"batch {batch_size} x {num} = {batch_size * num}"
    )


def name_engine(accelerator: Accelerator) -> str:
    """What holds weights and optimiser state: `ZeRO-1`, `ZeRO-2`, `ZeRO-3` (of DeepSpeed), `DDP`, or `plain` (PyTorch)."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"ZeRO-{plugin.zero_stage}"
    return "DDP" if accelerator.num_processes > 1 else "plain"
