"""Fine-tuning to compare images with texts, by image-text contrast, from any checkpoint that was trained with it."""

from pathlib import Path

import torch
from pydantic import Field
from safetensors import safe_open

from sycoca.data.pipeline import DataConfig
from sycoca.finetune.pairs import build_batches, read_as_trained
from sycoca.finetune.start import Start, StartConfig, start_from
from sycoca.log import logger
from sycoca.models.sycoca import Part
from sycoca.objectives.base import ObjectiveConfig
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.pretrained import Pretrained, find_checkpoint, save_description
from sycoca.train.layer_decay import layer_scales
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.task import PretrainTask
from sycoca.train.validation import CHOOSE_BY, EvaluateConfig, build_evaluation
from sycoca.types import ConfigError

PARTS: frozenset[Part] = frozenset({"text", "contrast"})
CAPTIONING_PARTS: frozenset[Part] = frozenset({"text", "contrast", "text_decoder"})
OBJECTIVE = "itc"
LOG_LOGIT_SCALE = f"objectives.{OBJECTIVE}.log_logit_scale"
"""The temperature's name in a checkpoint whose contrastive objective is called as ours, as in every YAML of configs/."""


class FinetuneRetrievalConfig(TrainConfig):
    """One experiment. The tokenizer, and size, means and deviations of the transform, are the starting model's."""

    start: StartConfig
    data: DataConfig
    mask_duplicates: bool = True
    """Leave pairs of the same image, and pairs of the same caption, out of the negatives."""
    temperature: float | None = Field(default=None, gt=0)
    """What it starts at; null: where the checkpoint left it."""
    caption_weight: float = Field(default=0.0, ge=0)
    """Of captioning beside contrast. Above 0 the checkpoint still rates captions, which re-ranking needs."""
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def parts(self) -> frozenset[Part]:
        """What is trained, and so what is left in the checkpoint."""
        return CAPTIONING_PARTS if self.caption_weight > 0 else PARTS


def finetune_retrieval(config: FinetuneRetrievalConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and where the checkpoint is."""
    if config.run.sample_every:
        raise ConfigError("run.sample_every: retrieval writes no samples; set it to 0")
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    start = start_from(config.start, parts=config.parts, transform=config.data.transform)
    data = read_as_trained(config.data, config.start, start)
    return run_job(config, build_job(config, start, data, build_task(config, start)), accelerator)


def build_task(config: FinetuneRetrievalConfig, start: Start) -> PretrainTask:
    """Contrast at weight 1, by itself unless captioning has a weight."""
    contrast = ContrastiveConfig(mask_duplicates=config.mask_duplicates)
    if config.temperature is not None:
        contrast = contrast.model_copy(update={"init_temperature": config.temperature})
    objectives: dict[str, ObjectiveConfig] = {OBJECTIVE: contrast}
    if config.caption_weight > 0:
        objectives["ic"] = CaptioningConfig(weight=config.caption_weight)
    task = PretrainTask(
        start.model, objectives, start.config.relevance, num_chunks=config.optim.num_chunks, is_bf16=config.run.is_bf16
    )
    if config.temperature is None and config.start.weights == "checkpoint":
        take_temperature(task, Path(config.start.checkpoint))
    return task


def take_temperature(task: PretrainTask, checkpoint: Path) -> None:
    """Go on from the checkpoint's temperature; one that has none leaves it as initialised, which is said in the log."""
    folder = find_checkpoint(checkpoint)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        if LOG_LOGIT_SCALE not in weights.keys():  # noqa: SIM118  the file is no mapping
            logger.warning("start: %s has no %s; the temperature starts anew", folder, LOG_LOGIT_SCALE)
            return
        with torch.no_grad():
            task.get_parameter(LOG_LOGIT_SCALE).copy_(weights.get_tensor(LOG_LOGIT_SCALE))


def build_job(config: FinetuneRetrievalConfig, start: Start, data: DataConfig, task: PretrainTask) -> Job:
    """The task with its data and its evaluation."""
    evaluation = None
    if config.evaluate.shards:
        subject = Pretrained(task.model, start.tokenizer, start.config)
        measure = build_evaluation(config.evaluate, data, subject, is_bf16=config.run.is_bf16)
        evaluation = Evaluation(measure, config.evaluate.every, CHOOSE_BY)
    return Job(
        task, build_batches(data, start, seed=config.run.seed),
        describe=lambda folder: save_description(folder, start.tokenizer, start.config), evaluation=evaluation,
        layer_scales=layer_scales(task.model, config.optim.layer_decay),
    )  # fmt: skip
