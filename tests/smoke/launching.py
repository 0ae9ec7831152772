"""Real launches of tools/pretrain.py with configs/pretrain/smoke.yaml, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import run_script

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMOKE = "configs/pretrain/smoke.yaml"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PLAIN = [sys.executable]
DDP = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def accelerate(launch_file: str | Path) -> list[str]:
    """The command of two processes under a launch file; port 0 is any free one, so that tests may run side by side."""
    # `accelerate launch` by its other name, which does not import the library's other commands first
    command = [str(BIN / "accelerate-launch"), "--config_file", str(launch_file)]
    return [*command, "--num_processes", "2", "--main_process_port", "0"]


def zero_3(folder: Path, name: str = "zero3") -> list[str]:
    """Its launch file changed to split small weights too, or nothing here would be split."""
    settings = json.loads((ROOT / f"launch/deepspeed/{name}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / f"{name}.json").write_text(json.dumps(settings))
    launch_file = (ROOT / f"launch/accelerate/{name}.yaml").read_text()
    (folder / f"{name}.yaml").write_text(launch_file.replace(f"launch/deepspeed/{name}.json", str(folder / f"{name}.json")))
    return accelerate(folder / f"{name}.yaml")


def nodes(launch_file: str, port: int) -> list[tuple[list[str], dict[str, str]]]:
    """The commands of two nodes of one process each on this machine, up to the configuration, and their environments."""
    shared = {"NUM_NODES": "2", "GPUS_PER_NODE": "1", "MAIN_IP": "127.0.0.1", "MAIN_PORT": str(port)}
    command = ["bash", str(ROOT / "launch/multi_node.sh"), launch_file]
    return [(command, shared | {"NODE_RANK": str(number), "PYTHON": sys.executable}) for number in range(2)]


def environment(data: Path) -> dict[str, str]:
    """Of a launch on the CPU; `data` is what the configurations call DATA."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED and not name.startswith("ACCELERATE")}
    env |= {"DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return env | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def run(command: list[str], data: Path, *, is_ddp: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root, on the CPU."""
    env = environment(data) | ({"ACCELERATE_USE_CPU": "true"} if is_ddp else {})
    if command[: len(PLAIN)] == PLAIN:
        return run_script(command[len(PLAIN) :], env)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)


def pretrain(launcher: list[str], data: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Pretrain at the smoke size into `folder`; fails with the run's last words where it does not end well."""
    command = [*launcher, "tools/pretrain.py", SMOKE, f"run.folder={folder}", *overrides]
    done = run(command, data, is_ddp=launcher is DDP)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step, and every loss and the gradient's norm, of each line of training in log.jsonl, in the order written."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{name: value for name, value in line.items() if "loss" in name or name == "grad_norm"} for line in lines]
    return [(line["step"], values) for line, values in zip(lines, kept, strict=True) if values]
