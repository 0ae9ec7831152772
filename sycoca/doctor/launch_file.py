"""The launch file against the experiment: it says how processes are started, and nothing that the experiment says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sycoca.doctor.report import Check
from sycoca.train.launch_check import FSDP_SWITCHES, OF_THE_EXPERIMENT
from sycoca.train.pretrain import PretrainConfig
from sycoca.types import ConfigError

_KINDS = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
_OF_ZERO = ("zero_optimization", "zero_force_ds_cpu_optimizer")
"""What a DeepSpeed JSON may hold."""
_OURS = OF_THE_EXPERIMENT | {
    "fp16_enabled": "run.precision", "dynamo_config": "run.compile", "zero_stage": "the DeepSpeed JSON",
}  # fmt: skip
"""Keys of a launch file or DeepSpeed JSON whose number has its home elsewhere, and where."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How many processes share the work, and what is split over them."""

    num_processes: int = 1
    zero_stage: int = 0
    """0: none."""
    is_fsdp: bool = False
    is_offloaded: bool = False
    """Whether the optimiser's state waits on the CPU."""

    @property
    def engine(self) -> str:
        """What it starts, for people."""
        if self.is_fsdp:
            return "FSDP2"
        return f"ZeRO-{self.zero_stage}" if self.zero_stage else "nothing split"

    @property
    def splits_weights(self) -> bool:
        """Whether no rank has whole weights."""
        return self.is_fsdp or self.zero_stage == 3


def read_launch(path: Path) -> tuple[Launch, Mapping[str, Any], Mapping[str, Any]]:
    """What the file starts, its content, and its DeepSpeed JSON's (empty without one). Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"--launch: no file at {path}; name one of launch/accelerate/")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    settings = _read_json(content.get("deepspeed_config", {}).get("deepspeed_config_file"))
    zero = settings.get("zero_optimization", {})
    is_fsdp = content.get("distributed_type") == "FSDP"
    launch = Launch(int(content.get("num_processes", 1)), zero.get("stage", 0), is_fsdp, "offload_optimizer" in zero)
    return launch, content, settings


def check_launch(path: Path, config: PretrainConfig) -> list[Check]:
    """Every finding about a launch file."""
    launch, content, settings = read_launch(path)
    wrong = [*_kind_faults(content, launch), *_precision_faults(content), *_home_faults(content, settings)]
    wrong += _deepspeed_faults(content, settings, launch) + _fsdp_faults(content, launch) + _config_faults(config, launch)
    found = [Check("launch file", "wrong", f"{path}: {fault}") for fault in wrong]
    num_gpus = torch.cuda.device_count()
    per_machine = launch.num_processes // max(1, int(content.get("num_machines", 1)))
    if num_gpus and per_machine > num_gpus:
        says = f"{path}: {per_machine} processes a machine and {num_gpus} GPUs here; launch with --num_processes {num_gpus}"
        found.append(Check("launch file", "wrong", says))
    if not num_gpus and launch.num_processes > 1:
        says = f"{path}: {launch.num_processes} processes, and no GPU here to check them against"
        found.append(Check("launch file", "warning", f"{says}; run this where the training will run"))
    says = f"{path}: {launch.num_processes} processes, {launch.engine}, nothing said twice"
    return found or [Check("launch file", "ok", says)]


def _read_json(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"deepspeed_config_file: no file at {path}; paths are relative to where accelerate is started")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return settings


def _kind_faults(content: Mapping[str, Any], launch: Launch) -> list[str]:
    kind = _text(content.get("distributed_type", "NO"))
    if kind not in _KINDS:
        return [f"distributed_type: {kind} is not supported; use one of {', '.join(_KINDS)}"]
    if kind == "NO" and launch.num_processes > 1:
        return [f"distributed_type: NO starts one process, not {launch.num_processes}; set MULTI_GPU or DEEPSPEED"]
    return []


def _precision_faults(content: Mapping[str, Any]) -> list[str]:
    precision = _text(content.get("mixed_precision", "no")).lower()
    if precision == "no":
        return []
    return [f'mixed_precision: expected "no", found {precision}; run.precision of the experiment says it']


def _home_faults(content: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Numbers that have another home. Everything at the top of the JSON but ZeRO's own settings is one of them."""
    plugin = content.get("deepspeed_config", {})
    faults = [f"{key}: remove it; {_OURS[key]} says it" for key in _OURS if key in content]
    faults += [f"deepspeed_config.{key}: remove it; {_OURS[key]} says it" for key in _OURS if key in plugin]
    others = [key for key in settings if key not in _OF_ZERO]
    name = plugin.get("deepspeed_config_file")
    instead = {key: f"{_OURS[key]} says it" if key in _OURS else "it holds ZeRO settings only" for key in others}
    return faults + [f"{name}: {key}: remove it; {instead[key]}" for key in others]


def _deepspeed_faults(content: Mapping[str, Any], settings: Mapping[str, Any], launch: Launch) -> list[str]:
    if _text(content.get("distributed_type", "NO")) != "DEEPSPEED":
        return []
    plugin = content.get("deepspeed_config", {})
    if "deepspeed_config_file" not in plugin:
        return ["deepspeed_config.deepspeed_config_file: missing; name one of launch/deepspeed/"]
    faults = []
    if launch.zero_stage not in (1, 2, 3):
        found = settings.get("zero_optimization", {}).get("stage")
        faults.append(f"{plugin['deepspeed_config_file']}: zero_optimization.stage: expected 1, 2 or 3, found {found}")
    if _text(plugin.get("zero3_init_flag", False)).lower() == "true":
        faults.append("zero3_init_flag: set it to false; the model is built whole, with one seed on every rank, and split then")
    return faults


def _fsdp_faults(content: Mapping[str, Any], launch: Launch) -> list[str]:
    if not launch.is_fsdp:
        return []
    plugin = {f"FSDP_{name.removeprefix('fsdp_').upper()}": value for name, value in content.get("fsdp_config", {}).items()}
    faults = []
    if str(plugin.get("FSDP_VERSION", 1)) != "2":
        faults.append("fsdp_config.fsdp_version: set it to 2, or name launch/accelerate/fsdp2.yaml")
    asked = [name for name in FSDP_SWITCHES if _text(plugin.get(name, False)).lower() == "true"]
    return faults + [f"fsdp_config.{name.lower()}: set it to false: {FSDP_SWITCHES[name]}" for name in asked]


def _config_faults(config: PretrainConfig, launch: Launch) -> list[str]:
    """What the experiment asks for and an engine that splits weights does not have."""
    if not launch.splits_weights:
        return []
    asked = {"optim.average_decay": config.optim.average_decay, "run.grad_norms_every": config.run.grad_norms_every}
    says = f"{launch.engine} keeps no whole weights on a rank; set it to 0, or launch ZeRO-2"
    return [f"{name}: {says}" for name, is_on in asked.items() if is_on]


def _text(value: Any) -> str:
    """YAML reads an unquoted `no` as false, and accelerate means the word."""
    return {False: "NO", True: "true"}.get(value, str(value)) if isinstance(value, bool) else str(value)
