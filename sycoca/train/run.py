"""A run, whatever it trains: engine, resume, loop, hooks, checkpoints. Pretraining and every fine-tuning hand it a `Job`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field, model_validator
from torch import nn

from sycoca.config import Config, dump_config
from sycoca.data.position import PositionTracker
from sycoca.distributed import rank, world_size
from sycoca.log import JsonlTracker, TensorBoardTracker, Tracker, WandbTracker, logger, set_up_console
from sycoca.train.average import WeightAverage, check_average
from sycoca.train.checkpoint.hook import CheckpointHook, SavePlan
from sycoca.train.checkpoint.loading import load_checkpoint
from sycoca.train.checkpoint.mirror import Mirror
from sycoca.train.checkpoint.resume import find_resume
from sycoca.train.checkpoint.saving import Saver
from sycoca.train.checkpoint.stop import StopSignals
from sycoca.train.diagnosis.flops import find_counter, peak_of
from sycoca.train.diagnosis.grad_norms import GradNormHook, check_grad_norms
from sycoca.train.diagnosis.non_finite import NonFiniteHook
from sycoca.train.diagnosis.phases import SAMPLES, SAVING, in_phase
from sycoca.train.diagnosis.watchdog import Watchdog
from sycoca.train.engine import build_accelerator, callable_in_parts, describe_engine, prepare, transformer_blocks
from sycoca.train.hooks import AverageHook, EvaluateHook, LogHook, SampleHook, Speed
from sycoca.train.loop import Hook, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.train.task import PretrainTask
from sycoca.train.trainee import Trainee


class RunConfig(Config):
    """Where a run lives, and how often it does what. All counts are steps; 0 is never."""

    folder: str
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    """torch.compile of every transformer block."""
    resume: str = "auto"
    """`auto` continues from this folder's last checkpoint, else the mirror's; `none` starts anew; otherwise a checkpoint's path
    or URL."""
    log_every: int = 20
    sample_every: int = 0
    checkpoint_every: int = 1000
    checkpoint_minutes: float = Field(default=0, ge=0)
    """Save also where the last checkpoint is this old; 0 is never."""
    background_save: bool = True
    """Training goes on while a checkpoint, copied to CPU memory, is written."""
    num_kept: int = 3
    mirror: str | None = None
    """A URL that fsspec knows (s3://bucket/run, file:///shared/run): every checkpoint is also sent there."""
    tensorboard: bool = True
    wandb_project: str | None = None
    stall_minutes: float = Field(default=10.0, ge=0)
    """A rank that is in one phase (forward, evaluation, saving ...) for longer is reported with its stack; 0: never."""
    stall_abort: float = Field(default=0.0, ge=0)
    """Minutes in one phase that end the process with an error; 0 waits for ever. Above the longest evaluation."""
    grad_norms_every: int = Field(default=0, ge=0)
    """Logs the gradient's norm of each objective over the shared parameters, at the cost of a backward pass an objective."""

    @model_validator(mode="after")
    def _check_watchdog(self) -> "RunConfig":
        if self.stall_abort and not 0 < self.stall_minutes <= self.stall_abort:
            raise ValueError("stall_abort: the watchdog reports first; set stall_minutes above 0 and not above stall_abort")
        return self

    @property
    def is_bf16(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return self.precision == "bf16"


class TrainConfig(Config):
    """What every experiment has, whatever it trains."""

    run: RunConfig
    optim: OptimConfig


@dataclass(frozen=True)
class Evaluation:
    """An evaluation inside a run: `measure` is called on every rank; the highest `choose_by` makes the best checkpoint."""

    measure: Callable[[], dict[str, float]]
    every: int
    choose_by: str


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and what is made of it on the way."""

    task: nn.Module
    """Its `forward(batch)` gives the loss and metrics."""
    load_batches: Callable[[Any], Iterable[Any]]
    """This rank's endless batches, from a position that a checkpoint keeps (None: from the start)."""
    describe: Callable[[Path], None]
    """Writes beside a checkpoint's weights what it takes to build the model again."""
    evaluation: Evaluation | None = None
    write_samples: Callable[[int], None] | None = None
    layer_scales: dict[nn.Parameter, float] | None = None
    """Factors of the learning rate, for parameters whose factor is not 1."""


def start_engine(config: TrainConfig, *, batch_size: int) -> Accelerator:
    """The accelerator of this launch, the console, and equal random numbers on every rank, for building the task."""
    accelerator = build_accelerator(config.optim.clip_norm, batch_size=batch_size)
    set_up_console(is_main=accelerator.is_main_process)
    logger.info("%s", describe_engine(accelerator, config.run.precision, batch_size=batch_size))
    set_seed(config.run.seed)
    return accelerator


def run_job(config: TrainConfig, job: Job, accelerator: Accelerator) -> dict[str, float | str | int]:
    """As `train_job`, as the last of this launch: it ends the process group."""
    figures = train_job(config, job, accelerator)
    accelerator.end_training()
    return figures


def train_job(config: TrainConfig, job: Job, accelerator: Accelerator) -> dict[str, float | str | int]:
    """Train until the last step, from the last checkpoint if there is one; gives the last evaluation's figures."""
    if config.run.compile:
        compile_blocks(job.task)
    optimizer = build_optimizer(job.task, config.optim, job.layer_scales)
    check_average(config.optim, accelerator)
    check_grad_norms(config.run.grad_norms_every, job.task, accelerator)
    prepared, prepared_optimizer = prepare(accelerator, job.task, optimizer)
    average = WeightAverage(job.task, config.optim.average_decay) if config.optim.average_decay else None
    trainee = Trainee(accelerator, prepared, prepared_optimizer, average)
    trackers = open_trackers(config) if accelerator.is_main_process else []
    set_seed(config.run.seed + 1 + rank())  # other dropout and random masks on every rank
    state = TrainState()
    mirror = Mirror(config.run.mirror) if config.run.mirror is not None else None
    with StopSignals() as signals, watch(config.run, state), ExitStack() as at_the_end:
        for tracker in trackers:
            at_the_end.callback(tracker.close)
        resume(config, trainee, state, mirror=mirror)
        hooks = build_hooks(config, job, trainee, state, trackers)
        saving = build_checkpoint_hook(config, job, trainee, state, hooks=hooks, signals=signals, mirror=mirror)
        hooks.append(in_phase(state.clock, SAVING, saving))
        train(
            trainee.task, follow(job.load_batches(state.positions), state), trainee.optimizer, accelerator=accelerator,
            plan=config.optim, state=state, hooks=hooks,
        )  # fmt: skip
    figures = next((hook.figures for hook in hooks if isinstance(hook, EvaluateHook)), {})
    return {"checkpoint": str(checkpoints(config) / "last"), "step": state.step, **figures}


def watch(config: RunConfig, state: TrainState) -> AbstractContextManager[Any]:
    """The watchdog over this rank, or nothing where it is switched off."""
    if config.stall_minutes == 0:
        return nullcontext()
    stall, abort = 60 * config.stall_minutes, 60 * config.stall_abort
    folder = Path(config.folder) / "state"
    return Watchdog(state.clock, folder, rank=rank(), world_size=world_size(), stall_seconds=stall, abort_seconds=abort)


def compile_blocks(task: nn.Module) -> None:
    """torch.compile of every transformer block, each by itself: blocks of a tower are alike and are compiled once."""
    for block in transformer_blocks(task):
        block.compile()


def checkpoints(config: TrainConfig) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.run.folder) / "checkpoints"


def open_trackers(config: TrainConfig) -> list[Tracker]:
    """The run's folder with its configuration, and where figures are written."""
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    logger.info("configuration, as resolved:\n%s", dump_config(config))
    trackers: list[Tracker] = [JsonlTracker(folder / "log.jsonl")]
    if config.run.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard"))
    if config.run.wandb_project:
        trackers.append(WandbTracker(config.run.wandb_project, folder, config.model_dump(mode="json")))
    return trackers


def resume(config: TrainConfig, trainee: Trainee, state: TrainState, *, mirror: Mirror | None) -> None:
    """Continue from a checkpoint where there is one to continue from."""
    path = find_resume(checkpoints(config), config.run.resume, mirror=mirror)
    if path is None:
        logger.info("starting at step 0")
        return
    load_checkpoint(path, trainee, state)
    logger.info("resumed from %s at step %d", path, state.step)


def follow(loader: Iterable[Any], state: TrainState) -> Iterator[Any]:
    """The loader's batches, keeping account in `state` of the position and of what was read."""
    tracker = PositionTracker(state.positions)
    for batch in loader:
        tracker.update(batch["position"])
        state.positions = tracker.state()
        state.num_pairs += len(batch["key"]) * world_size()
        yield batch


def build_hooks(config: TrainConfig, job: Job, trainee: Trainee, state: TrainState, trackers: list[Tracker]) -> list[Hook]:
    """Refuse what is not finite, average, log, evaluate, sample: in this order."""
    guard = NonFiniteHook(config.optim, Path(config.run.folder) / "bad_batches")
    speed = Speed(find_counter(job.task), peak_of(trainee.accelerator.device, is_bf16=config.run.is_bf16))
    hooks: list[Hook] = [guard, LogHook(config.run.log_every, config.optim.num_steps, trackers, speed)]
    average, evaluation = trainee.average, None
    if config.run.grad_norms_every:
        assert isinstance(job.task, PretrainTask)
        hooks.append(GradNormHook(config.run.grad_norms_every, job.task, trackers))
    if average is not None:
        hooks.insert(1, AverageHook(average))
    if job.evaluation is not None:
        measure = job.evaluation.measure if average is None else average.use_in(job.evaluation.measure)
        evaluation = EvaluateHook(job.evaluation.every, measure, job.evaluation.choose_by, state, trackers)
        hooks.append(evaluation)
    if job.write_samples is not None:
        write_samples = callable_in_parts(trainee.accelerator, trainee.task, job.write_samples)
        hooks.append(in_phase(state.clock, SAMPLES, SampleHook(config.run.sample_every, write_samples)))
    return hooks


def build_checkpoint_hook(
    config: TrainConfig, job: Job, trainee: Trainee, state: TrainState, *, hooks: list[Hook], signals: StopSignals,
    mirror: Mirror | None,
) -> CheckpointHook:  # fmt: skip
    """Comes after the other hooks: what it saves has been evaluated."""

    def describe(folder: Path) -> None:
        job.describe(folder)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    plan = SavePlan(config.run.checkpoint_every, config.run.checkpoint_minutes, config.run.num_kept)
    saver = Saver(checkpoints(config), trainee, describe, is_background=config.run.background_save)
    evaluation = next((hook for hook in hooks if isinstance(hook, EvaluateHook)), None)
    return CheckpointHook(plan, saver, state, evaluation=evaluation, signals=signals, mirror=mirror)
