"""Fine-tuning to write captions, from any checkpoint with a text decoder: by cross-entropy, then self-critically on CIDEr-D."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.distributed import rank, world_size
from sycoca.evaluation.caption_metrics import score_captions
from sycoca.evaluation.captioning import caption_batches
from sycoca.finetune.pairs import build_batches, read_as_trained
from sycoca.finetune.references import CiderReward, read_references
from sycoca.finetune.self_critical import SelfCriticalConfig, SelfCriticalTask
from sycoca.finetune.start import Start, StartConfig, start_from
from sycoca.generation import GenerationConfig
from sycoca.log import logger
from sycoca.models.sycoca import Part
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.pretrained import Pretrained, save_description
from sycoca.train.layer_decay import layer_scales
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.samples import SampleWriter
from sycoca.train.task import PretrainTask, precision
from sycoca.train.validation import EvaluateConfig, held_out, whole_on_this_rank
from sycoca.types import ConfigError

PARTS: frozenset[Part] = frozenset({"text", "text_decoder"})
CHOOSE_BY = "CIDEr"
"""The figure by which the best checkpoint is chosen."""


class CaptionEvaluateConfig(EvaluateConfig):
    """Held-out shards, captioned and scored against all their references `every` steps and at the end; 0 is never."""

    generation: GenerationConfig = GenerationConfig()
    limit: int | None = Field(default=None, ge=1)
    """Images at most, of all ranks together; null: all of them."""


class FinetuneCaptioningConfig(TrainConfig):
    """One experiment. The tokenizer, and size, means and deviations of the transform, are the starting model's."""

    start: StartConfig
    data: DataConfig
    stage: Literal["cross_entropy", "self_critical"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over the vocabulary; of the stage cross_entropy only."""
    self_critical: SelfCriticalConfig = SelfCriticalConfig()
    evaluate: CaptionEvaluateConfig = CaptionEvaluateConfig()


def finetune_captioning(config: FinetuneCaptioningConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and where the checkpoint is."""
    check(config)
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    start = start_from(config.start, parts=PARTS, transform=config.data.transform)
    data = read_as_trained(config.data, config.start, start)
    task = build_task(config, start, data)
    return run_job(config, build_job(config, start, data, task), accelerator)


def check(config: FinetuneCaptioningConfig) -> None:
    """What the parts cannot check alone. Raises ConfigError."""
    if config.stage == "self_critical" and config.label_smoothing > 0:
        raise ConfigError("label_smoothing: self-critical training has no labels; set it to 0")
    if config.stage == "self_critical" and config.optim.num_chunks > 1:
        raise ConfigError("optim.num_chunks: self-critical training draws its captions once; lower data.batch_size instead")
    if config.run.sample_every and not config.evaluate.shards:
        raise ConfigError("run.sample_every: samples are of held-out images; name evaluate.shards, or set it to 0")


def build_task(config: FinetuneCaptioningConfig, start: Start, data: DataConfig) -> PretrainTask:
    """Captioning alone, at weight 1, from all patches; or its self-critical form, with the training captions as references."""
    if config.stage == "self_critical":
        references = read_references(data)
        logger.info("self-critical: %d images with %d references", len(references), sum(map(len, references.values())))
        return SelfCriticalTask(
            start.model, start.tokenizer, config.self_critical, CiderReward(references), is_bf16=config.run.is_bf16
        )
    objective = CaptioningConfig(label_smoothing=config.label_smoothing)
    return PretrainTask(
        start.model, {"ic": objective}, start.config.relevance, num_chunks=config.optim.num_chunks,
        is_bf16=config.run.is_bf16,
    )  # fmt: skip


def build_job(config: FinetuneCaptioningConfig, start: Start, data: DataConfig, task: PretrainTask) -> Job:
    """The task with its data, its evaluation and its samples."""
    subject = Pretrained(task.model, start.tokenizer, start.config)
    evaluation, writer = None, None
    if config.evaluate.shards:
        measure = build_evaluation(config.evaluate, data, subject, is_bf16=config.run.is_bf16)
        evaluation = Evaluation(measure, config.evaluate.every, CHOOSE_BY)
    if config.run.sample_every:
        writer = SampleWriter(task, subject, config.evaluate, data, Path(config.run.folder) / "samples")
    return Job(
        task, build_batches(data, start, seed=config.run.seed),
        describe=lambda folder: save_description(folder, start.tokenizer, start.config),
        evaluation=evaluation, write_samples=writer, layer_scales=layer_scales(task.model, config.optim.layer_decay),
    )  # fmt: skip


def build_evaluation(
    config: CaptionEvaluateConfig, data: DataConfig, subject: Pretrained, *, is_bf16: bool
) -> Callable[[], dict[str, float]]:
    """A function that captions the held-out images with `subject` as it stands, on all ranks, and scores the captions."""
    source = held_out(config, data)

    def evaluate() -> dict[str, float]:
        was_training = subject.model.training
        subject.model.eval()
        batches: Iterable[Mapping[str, Any]] = build_eval_loader(
            source, rank=rank(), world_size=world_size(), batch_size=config.batch_size
        )
        if config.limit is not None:
            batches = first_images(batches, len(range(rank(), config.limit, world_size())))
        with precision(subject.device, is_bf16=is_bf16):
            caption = partial(whole_on_this_rank(subject).caption, generation=config.generation)
            captioned = caption_batches(batches, caption)
        subject.model.train(was_training)
        return {**score_captions(*captioned).corpus, "num_images": float(len(captioned.predictions))}

    return evaluate


def first_images(batches: Iterable[Mapping[str, Any]], num: int) -> Iterator[dict[str, Any]]:
    """The batches' first `num` images: the rows of `image`, `key` and `captions`."""
    for batch in batches:
        if num <= 0:
            return
        yield {name: batch[name][:num] for name in ("image", "key", "captions")}
        num -= len(batch["key"])
