"""Pretraining: from a configuration to a trained checkpoint. Reads from top to bottom as the run does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file

from sycoca.config import Config, dump_config
from sycoca.data.pipeline import DataConfig, build_train_loader
from sycoca.data.position import PositionTracker
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.distributed import rank, world_size
from sycoca.log import JsonlTracker, TensorBoardTracker, Tracker, WandbTracker, logger, set_up_console
from sycoca.models.blocks import Block
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import ModelConfig, SyCoCa
from sycoca.objectives.union import AnyObjectiveConfig
from sycoca.pretrained import Pretrained, PretrainedConfig, find_checkpoint, load_weights, save_description
from sycoca.train.checkpoint import Trainee, find_resume, load_checkpoint
from sycoca.train.engine import build_accelerator, describe_engine, prepare
from sycoca.train.hooks import CheckpointHook, EvaluateHook, LogHook, SampleHook
from sycoca.train.loop import Hook, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.train.samples import SampleWriter
from sycoca.train.task import PretrainTask, needed_parts
from sycoca.train.validation import CHOOSE_BY, EvaluateConfig, build_evaluation
from sycoca.types import Batch, ConfigError


class RunConfig(Config):
    """Where a run lives, and how often it does what. All counts are steps; 0 is never."""

    folder: str
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    resume: str = "auto"
    """`auto` continues from this folder's last checkpoint, `none` starts anew, otherwise a checkpoint's path."""
    log_every: int = 20
    sample_every: int = 0
    checkpoint_every: int = 1000
    num_kept: int = 3
    tensorboard: bool = True
    wandb_project: str | None = None


class InitConfig(Config):
    """Weights to start from, other than timm's own (model.vision.pretrained)."""

    checkpoint: str | None = None
    strict: bool = True
    """False takes what fits by name and shape; what is left out is listed in the log."""


class PretrainConfig(Config):
    """One experiment."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    objectives: dict[str, AnyObjectiveConfig]
    relevance: RelevanceConfig = RelevanceConfig()
    optim: OptimConfig
    init: InitConfig = InitConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


@dataclass
class Run:
    """The parts of a run, built."""

    config: PretrainConfig
    tokenizer: Tokenizer
    task: PretrainTask
    """Bare; the trainee has it as the engine wraps it."""
    trainee: Trainee
    state: TrainState
    subject: Pretrained
    trackers: list[Tracker]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.folder)


def pretrain(config: PretrainConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and where the checkpoint is."""
    check(config)
    accelerator = build_accelerator(config.optim.clip_norm, batch_size=config.data.batch_size)
    set_up_console(is_main=accelerator.is_main_process)
    logger.info("%s", describe_engine(accelerator, config.run.precision, batch_size=config.data.batch_size))
    tokenizer = build_tokenizer(config.data.tokenizer.name)
    set_seed(config.run.seed)  # the same weights on every rank
    task = build_task(config, tokenizer)
    run = set_up(config, tokenizer, task, accelerator)
    set_seed(config.run.seed + 1 + rank())  # other dropout and random masks on every rank
    resume(run)
    hooks = build_hooks(run)
    train(
        run.trainee.task, batches(run), run.trainee.optimizer, accelerator=accelerator, plan=config.optim, state=run.state,
        hooks=hooks,
    )  # fmt: skip
    for tracker in run.trackers:
        tracker.close()
    accelerator.end_training()
    figures = next((hook.figures for hook in hooks if isinstance(hook, EvaluateHook)), {})
    return {"checkpoint": str(run.folder / "checkpoints" / "last"), "step": run.state.step, **figures}


def check(config: PretrainConfig) -> None:
    """What the parts cannot check alone. Raises ConfigError."""
    if not config.objectives:
        raise ConfigError("objectives: none named; add at least one, for example itc: {type: itc}")
    if config.evaluate.shards and "contrast" not in needed_parts(config.objectives):
        raise ConfigError("evaluate.shards: retrieval needs an objective of type itc; add one, or set evaluate.shards=[]")
    if config.data.transform.size != config.model.vision.image_size:
        raise ConfigError(
            f"data.transform.size is {config.data.transform.size} and model.vision.image_size is "
            f"{config.model.vision.image_size}; they must be equal"
        )


def build_task(config: PretrainConfig, tokenizer: Tokenizer) -> PretrainTask:
    """The model with its objectives, initialised or loaded as the configuration says."""
    parts = needed_parts(config.objectives)
    model = SyCoCa(config.model, vocab_size=tokenizer.vocab_size, max_tokens=config.data.max_tokens, parts=parts)
    task = PretrainTask(
        model, config.objectives, config.relevance, num_chunks=config.optim.num_chunks,
        is_bf16=config.run.precision == "bf16",
    )  # fmt: skip
    if config.init.checkpoint is not None:
        start_from(task, Path(config.init.checkpoint), is_strict=config.init.strict)
    if config.run.compile:
        for module in task.modules():
            if isinstance(module, Block):
                module.compile()
        for block in model.vision.vit.blocks:
            block.compile()
    num_trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    logger.info("model: %.1f M parameters, parts %s", num_trained / 1e6, ", ".join(sorted(parts)))
    return task


def start_from(task: PretrainTask, path: Path, *, is_strict: bool) -> None:
    """Take a checkpoint's weights. Unless strict, what fits is taken, and what is missing, unused or new is listed."""
    folder = find_checkpoint(path)
    weights = load_file(folder / "model.safetensors")
    own = task.state_dict()
    weights["step"] = own["step"]
    if not is_strict:
        fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
        logger.warning("init: not in the checkpoint, left as initialised: %s", sorted(own.keys() - fitting.keys()) or "nothing")
        logger.warning("init: in the checkpoint, not used: %s", sorted(weights.keys() - fitting.keys()) or "nothing")
        weights = own | fitting
    load_weights(task, weights, source=str(folder))
    logger.info("init: weights from %s", folder)


def set_up(config: PretrainConfig, tokenizer: Tokenizer, task: PretrainTask, accelerator: Accelerator) -> Run:
    """Give the task to the engine and make what surrounds it."""
    subject = Pretrained(task.model, tokenizer, describe_model(config, task))
    optimizer = build_optimizer(task, config.optim)
    prepared, prepared_optimizer = prepare(accelerator, task, optimizer)
    folder = Path(config.run.folder)
    trackers: list[Tracker] = []
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        logger.info("configuration, as resolved:\n%s", dump_config(config))
        trackers.append(JsonlTracker(folder / "log.jsonl"))
        if config.run.tensorboard:
            trackers.append(TensorBoardTracker(folder / "tensorboard"))
        if config.run.wandb_project:
            trackers.append(WandbTracker(config.run.wandb_project, folder, config.model_dump(mode="json")))
    trainee = Trainee(accelerator, prepared, prepared_optimizer)
    return Run(config, tokenizer, task, trainee, TrainState(), subject, trackers)


def describe_model(config: PretrainConfig, task: PretrainTask) -> PretrainedConfig:
    """What a checkpoint says of its model."""
    return PretrainedConfig(
        model=config.model, parts=sorted(task.model.parts), transform=config.data.transform, relevance=config.relevance,
        max_tokens=config.data.max_tokens,
    )  # fmt: skip


def resume(run: Run) -> None:
    """Continue from a checkpoint where there is one to continue from."""
    path = find_resume(run.folder / "checkpoints", run.config.run.resume)
    if path is None:
        logger.info("starting at step 0")
        return
    load_checkpoint(path, run.trainee, run.state)
    logger.info("resumed from %s at step %d", path, run.state.step)


def batches(run: Run):
    """This rank's batches, keeping account of the position in `run.state`."""
    positions = run.state.positions
    loader = build_train_loader(
        run.config.data, run.tokenizer, seed=run.config.run.seed, rank=rank(), world_size=world_size(), resume=positions
    )
    tracker = PositionTracker(positions)
    for batch in loader:
        tracker.update(batch["position"])
        run.state.positions = tracker.state()
        run.state.num_pairs += len(batch["key"]) * world_size()
        yield Batch(**batch)


def build_hooks(run: Run) -> list[Hook]:
    """Log, evaluate, sample, save: in this order."""
    config = run.config
    hooks: list[Hook] = [LogHook(config.run.log_every, config.optim.num_steps, run.trackers)]
    evaluation = None
    if config.evaluate.shards:
        is_bf16 = config.run.precision == "bf16"
        evaluate = build_evaluation(config.evaluate, config.data, run.subject, is_bf16=is_bf16)
        evaluation = EvaluateHook(config.evaluate.every, evaluate, CHOOSE_BY, run.state, run.trackers)
        hooks.append(evaluation)
        if config.run.sample_every:
            writer = SampleWriter(run.task, run.subject, config.evaluate, config.data, run.folder / "samples")
            hooks.append(SampleHook(config.run.sample_every, writer))
    hooks.append(
        CheckpointHook(
            config.run.checkpoint_every, config.run.num_kept, run.folder / "checkpoints", run.trainee, run.state,
            describe=lambda folder: describe(run, folder), evaluation=evaluation,
        )
    )  # fmt: skip
    return hooks


def describe(run: Run, folder: Path) -> None:
    """Write beside the weights what they are."""
    save_description(folder, run.tokenizer, run.subject.config)
    (folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")

