"""Accelerate, DeepSpeed and FSDP2: what runs, and where each number of the engine's own configuration comes from."""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sycoca.distributed import root_gathered, whole
from sycoca.models.blocks import PreNormBlock
from sycoca.train.launch_check import check_launch, is_asked
from sycoca.types import ConfigError


def build_accelerator(clip_norm: float, *, batch_size: int) -> Accelerator:
    """The accelerator of this launch. Precision is the task's own matter, so the engines keep float32 parameters.

    Under DeepSpeed the JSON of the launch file holds ZeRO settings only; batch size and clipping are written into it here.
    Raises ConfigError for a launch file that says what the experiment says, or what is not supported.
    """
    check_launch(os.environ)
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    is_launched = "LOCAL_RANK" in os.environ  # how torchrun and accelerate tell a process that it belongs to a group
    is_on_cpu = is_launched and not torch.cuda.is_available()
    if is_on_cpu:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    # unless it hears of CPUs accelerate takes launched processes for strangers there; under DeepSpeed it must not hear of them
    is_told = is_on_cpu and not is_asked(os.environ, "ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(cpu=is_told, mixed_precision="no", kwargs_handlers=handlers)
    if is_asked(os.environ, "ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate starts FSDP2 on GPUs only and would go on with DDP, without a word; PyTorch's own runs on gloo as well
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
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
    if accelerator.is_fsdp2:
        # each block's weights are gathered when it runs; what is outside of blocks, for the whole step
        blocks = {type(block).__name__ for block in transformer_blocks(task)}
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = sorted(blocks)
    return accelerator.prepare(task, optimizer)


def transformer_blocks(task: nn.Module) -> list[nn.Module]:
    """Every transformer block, timm's and ours."""
    blocks: list[nn.Module] = []
    for module in task.modules():
        if isinstance(module, PreNormBlock):
            blocks.append(module)
        elif isinstance(module, VisionTransformer):
            blocks.extend(module.blocks)
    return blocks


def clip_gradients(accelerator: Accelerator, task: nn.Module, clip_norm: float) -> Tensor | None:
    """Scale the gradients to at most this norm and give the norm before; DeepSpeed has clipped already, and tells it."""
    norm = accelerator.clip_grad_norm_(task.parameters(), clip_norm)
    return None if norm is None else whole(torch.as_tensor(norm)).detach()


def callable_in_parts(accelerator: Accelerator, task: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which calls parts of the task and not its forward; FSDP2 must have gathered for those.

    All ranks must make the same calls in the same order.
    """
    if not accelerator.is_fsdp2:
        return function

    def run(*args: Any) -> Any:
        with root_gathered(task):
            return function(*args)

    return run


def describe_engine(accelerator: Accelerator, precision: str, *, batch_size: int) -> str:
    """The first line of a run: what was really launched."""
    if is_asked(os.environ, "ACCELERATE_USE_DEEPSPEED") and accelerator.state.deepspeed_plugin is None:
        raise ConfigError("the launch file asks for DeepSpeed but it is not running; unset ACCELERATE_USE_CPU and launch again")
    if is_asked(os.environ, "ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise ConfigError("the launch file asks for FSDP2 but it is not running; start it with `accelerate launch`")
    num = accelerator.num_processes
    return (
        f"engine {name_engine(accelerator)}, {num} process{'es' if num > 1 else ''} on {accelerator.device.type}, {precision}, "
        f"batch {batch_size} x {num} = {batch_size * num}"
    )


def name_engine(accelerator: Accelerator) -> str:
    """What holds weights and optimiser state: `ZeRO-1`, `ZeRO-2`, `ZeRO-3` (of DeepSpeed, each also `with offload`), `FSDP2`,
    `DDP`, or `plain` (PyTorch)."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config["zero_optimization"]
        parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
        is_offloaded = any(part.get("device", "none") != "none" for part in parts)
        return f"ZeRO-{plugin.zero_stage}{' with offload' if is_offloaded else ''}"
    if accelerator.is_fsdp2:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "plain"
