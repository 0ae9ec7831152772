"""Pretraining: from a configuration to a trained checkpoint. Reads from top to bottom as the run does."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sycoca.config import Config
from sycoca.data.pipeline import DataConfig, build_train_loader
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.distributed import rank, world_size
from sycoca.log import logger
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import ModelConfig, SyCoCa
from sycoca.objectives.union import AnyObjectiveConfig
from sycoca.pretrained import Pretrained, PretrainedConfig, find_checkpoint, load_weights, save_description
from sycoca.train.layer_decay import layer_scales
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.samples import SampleWriter
from sycoca.train.task import PretrainTask, needed_parts
from sycoca.train.validation import CHOOSE_BY, EvaluateConfig, build_evaluation
from sycoca.types import ConfigError


class InitConfig(Config):
    """Weights to start from, other than timm's own (model.vision.pretrained)."""

    checkpoint: str | None = None
    strict: bool = True
    """False takes what fits by name and shape; what is left out is listed in the log."""


class PretrainConfig(TrainConfig):
    """One experiment."""

    data: DataConfig
    model: ModelConfig
    objectives: dict[str, AnyObjectiveConfig]
    relevance: RelevanceConfig = RelevanceConfig()
    init: InitConfig = InitConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def pretrain(config: PretrainConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and where the checkpoint is."""
    check(config)
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    tokenizer = build_tokenizer(config.data.tokenizer.name)
    task = build_task(config, tokenizer)
    return run_job(config, build_job(config, tokenizer, task), accelerator)


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
        is_bf16=config.run.is_bf16,
    )  # fmt: skip
    if config.init.checkpoint is not None:
        start_from(task, Path(config.init.checkpoint), is_strict=config.init.strict)
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


def build_job(config: PretrainConfig, tokenizer: Tokenizer, task: PretrainTask) -> Job:
    """The task with its data, its evaluation and its samples."""
    subject = Pretrained(task.model, tokenizer, describe_model(config, task))

    def load_batches(position: Any) -> Iterable[Any]:
        return build_train_loader(
            config.data, tokenizer, seed=config.run.seed, rank=rank(), world_size=world_size(), resume=position
        )

    evaluation, writer = None, None
    if config.evaluate.shards:
        measure = build_evaluation(config.evaluate, config.data, subject, is_bf16=config.run.is_bf16)
        evaluation = Evaluation(measure, config.evaluate.every, CHOOSE_BY)
        if config.run.sample_every:
            folder = Path(config.run.folder) / "samples"
            writer = SampleWriter(task, subject, config.evaluate, config.data, folder)
    return Job(
        task, load_batches, describe=lambda folder: save_description(folder, tokenizer, subject.config),
        evaluation=evaluation, write_samples=writer, layer_scales=layer_scales(task.model, config.optim.layer_decay),
    )  # fmt: skip


def describe_model(config: PretrainConfig, task: PretrainTask) -> PretrainedConfig:
    """What a checkpoint says of its model."""
    return PretrainedConfig(
        model=config.model, parts=sorted(task.model.parts), transform=config.data.transform, relevance=config.relevance,
        max_tokens=config.data.max_tokens,
    )  # fmt: skip
