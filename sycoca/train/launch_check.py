"""What a launch file may not say: everything that the experiment's YAML says, and what would train another way than asked."""

import json
from collections.abc import Mapping
from pathlib import Path

from sycoca.types import ConfigError

OF_THE_EXPERIMENT = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "optim.num_chunks",
    "gradient_clipping": "optim.clip_norm",
    "fp16": "run.precision",
    "bf16": "run.precision",
    "amp": "run.precision",
    "torch_autocast": "run.precision",
    "optimizer": "optim",
    "scheduler": "optim",
}
"""Keys of a DeepSpeed JSON, and the setting of the experiment that says the same."""

FSDP_SWITCHES = {
    "FSDP_OFFLOAD_PARAMS": "launch launch/accelerate/zero3_offload.yaml for weights on the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "set model.recompute=true in the experiment",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "every process builds the same weights from run.seed",
}
"""Switches of accelerate's FSDP that are refused, and what to do besides setting them to false."""


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for what the launcher, which speaks through the environment, may not ask for."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ConfigError(
            f'launch file: mixed_precision is {precision!r}; set it to "no" and choose run.precision in the experiment'
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise ConfigError(
            f"launch file: gradient_accumulation_steps is {steps}, which would contrast every share of a batch by itself; "
            "remove it, and set optim.num_chunks in the experiment: less memory, the gradients of the whole batch"
        )
    if is_asked(environment, "ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if is_asked(environment, "ACCELERATE_USE_FSDP"):
        _check_fsdp(environment)


def is_asked(environment: Mapping[str, str], name: str) -> bool:
    """Whether the launcher has set this switch."""
    return environment.get(name, "false").lower() in ("true", "1")


def _check_deepspeed(file: str) -> None:
    if file == "none":
        return
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"launch file: deepspeed_config_file {file} cannot be read: {error}") from error
    found = sorted(settings.keys() & OF_THE_EXPERIMENT.keys())
    if found:
        instead = ", ".join(sorted({OF_THE_EXPERIMENT[name] for name in found}))
        raise ConfigError(
            f"{file}: {', '.join(found)} must not stand here; remove it, the experiment says it ({instead}): the file holds "
            "ZeRO settings only"
        )


def _check_fsdp(environment: Mapping[str, str]) -> None:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"launch file: fsdp_version is {version}; set it to 2, or launch launch/accelerate/fsdp2.yaml")
    for name, instead in FSDP_SWITCHES.items():
        if is_asked(environment, name):
            raise ConfigError(f"launch file: {name.lower()} is true, which is not supported; set it to false: {instead}")
