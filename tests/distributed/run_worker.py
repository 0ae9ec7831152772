"""What a rank does in the tests of saving and resuming. A module of its own, so that a fork server imports the library once."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from toy_run import NUM_PAIRS, ToyTask, batches, describe

from sycoca.config import load_config
from sycoca.distributed import rank
from sycoca.train import run
from sycoca.train.checkpoint.loading import load_checkpoint
from sycoca.train.checkpoint.saving import Saver
from sycoca.train.engine import build_accelerator, prepare
from sycoca.train.hooks import LogHook
from sycoca.train.loop import StepReport, TrainState
from sycoca.train.pretrain import PretrainConfig, pretrain
from sycoca.train.trainee import Trainee

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Launch:
    """A run of configs/pretrain/smoke.yaml, and what happens to it on the way."""

    data: Path
    folder: Path
    world: int = 2
    zero_stage: int = 0
    overrides: tuple[str, ...] = ()
    killed_at: int = 0
    """Every rank is killed (SIGKILL) at the end of this step."""
    signal_at: int = 0
    """The last rank gets SIGUSR1 at the end of this step."""
    unwritable_at: int = 0
    """The last rank can write no file from the end of this step on."""
    port: int = 0
    environment: dict[str, str] = field(default_factory=dict)


def set_up_rank(number: int, launch: Launch) -> None:
    """What a launcher would set."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes: as in a launch, not as this process was made
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DATA": str(launch.data)}
    if launch.zero_stage:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(launch.zero_stage),
                       "ACCELERATE_MIXED_PRECISION": "no"}  # fmt: skip
    elif launch.world > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if launch.world > 1 or launch.zero_stage:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(launch.world),
                       "LOCAL_WORLD_SIZE": str(launch.world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(launch.port)}  # fmt: skip


def train_rank(number: int, launch: Launch, failures: Any) -> None:
    """Pretrain; any rank reports its error."""
    set_up_rank(number, launch)
    run.LogHook = lambda *settings: EventfulLogHook(launch, *settings)  # pyright: ignore[reportAttributeAccessIssue]
    config = load_config(
        PretrainConfig, ROOT / "configs/pretrain/smoke.yaml", [f"run.folder={launch.folder}", *launch.overrides]
    )
    try:
        pretrain(config)
    except Exception as error:
        failures.put(f"{type(error).__name__}: {error}")
        raise


class EventfulLogHook(LogHook):
    """The log, and then what is to happen at a step."""

    def __init__(self, launch: Launch, *settings: Any):
        super().__init__(*settings)
        self.launch = launch

    def __call__(self, report: StepReport) -> None:
        super().__call__(report)
        is_last_rank = rank() == self.launch.world - 1
        if report.step == self.launch.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if report.step == self.launch.signal_at and is_last_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        if report.step == self.launch.unwritable_at and is_last_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def save_toys_rank(number: int, launch: Launch, failures: Any) -> None:
    """Train a layer with tied and frozen weights and buffers under ZeRO-1, 2 and 3, save it, and load it again."""
    try:
        for stage in (1, 2, 3):
            AcceleratorState._reset_state(reset_partial_state=stage > 1)
            set_up_rank(number, replace(launch, zero_stage=stage))
            save_toy(launch.folder / f"zero_{stage}")
    except Exception as error:
        failures.put(repr(error))
        raise


class TiedTask(ToyTask):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


def build_toy(lr: float) -> Trainee:
    torch.manual_seed(3)
    accelerator = build_accelerator(1.0, batch_size=NUM_PAIRS)
    task = TiedTask()
    optimizer = torch.optim.AdamW([weight for weight in task.parameters() if weight.requires_grad], lr=lr)
    return Trainee(accelerator, *prepare(accelerator, task, optimizer))


def save_toy(folder: Path) -> None:
    trainee = build_toy(lr=0.1)
    for _, batch in zip(range(2), batches(None), strict=False):
        loss, _ = trainee.task(batch)
        trainee.accelerator.backward(loss)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
    state = TrainState(step=2, positions={"rank": rank()})
    saver = Saver(folder, trainee, describe, is_background=True)
    saver.begin(state, metrics={})
    path = saver.finish()
    again, other = TrainState(), build_toy(lr=0.1)
    load_checkpoint(path, other, again)
    assert again.positions["rank"] == rank()
    weights: Any = other.accelerator.get_state_dict(other.task)
    if rank() == 0:
        expected = load_file(path / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


Rank = Callable[[int, Launch, Any], None]
