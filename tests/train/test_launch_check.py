"""What a launch file may not say is refused in one line that says what to do."""

import json
from pathlib import Path

import pytest
import yaml

from sycoca.train.launch_check import OF_THE_EXPERIMENT, check_launch
from sycoca.types import ConfigError

ROOT = Path(__file__).parents[2]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def deepspeed(folder: Path, **settings: object) -> dict[str, str]:
    """The environment of a launch with this DeepSpeed JSON."""
    file = folder / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision is 'bf16'; set it to \"no\" and choose run.precision"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"gradient_accumulation_steps is 4.* set optim.num_chunks"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version is 1; set it to 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true.*zero3_offload.yaml"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing is true.*model.recompute=true"),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading is true.*set it to false"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else None,
)
def test_a_launch_file_that_says_what_the_experiment_says_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        check_launch(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", OF_THE_EXPERIMENT)
def test_a_deepspeed_file_with_more_than_zero_settings_is_refused(key: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"zero.json: {key} must not stand here.*\({OF_THE_EXPERIMENT[key]}\)"):
        check_launch(deepspeed(tmp_path, **{key: 1}))


def test_a_deepspeed_file_that_is_not_there_is_refused(tmp_path: Path):
    environment = deepspeed(tmp_path) | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "gone.json")}
    with pytest.raises(ConfigError, match=r"gone.json cannot be read"):
        check_launch(environment)


def test_zero_settings_alone_and_an_ordinary_launch_pass(tmp_path: Path):
    check_launch(deepspeed(tmp_path, zero_force_ds_cpu_optimizer=False))
    check_launch({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})
    check_launch(FSDP2 | {"FSDP_OFFLOAD_PARAMS": "false"})
    check_launch({})


@pytest.mark.parametrize("file", sorted((ROOT / "launch/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_file_of_ours_passes(file: Path, monkeypatch: pytest.MonkeyPatch):
    settings = yaml.safe_load(file.read_text())
    environment = {"ACCELERATE_MIXED_PRECISION": settings.get("mixed_precision", "no")}
    if "deepspeed_config" in settings:
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        environment |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": settings["deepspeed_config"]["deepspeed_config_file"]}
    if "fsdp_config" in settings:
        environment |= {"ACCELERATE_USE_FSDP": "true"}
        environment |= {name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()}
    monkeypatch.chdir(ROOT)
    check_launch(environment)
