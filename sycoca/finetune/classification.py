"""Fine-tuning for image classification: from a checkpoint and labelled images to a classifier."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sycoca.config import Config
from sycoca.data.classes import ClassRecords, load_class_records
from sycoca.data.indexed import IndexedConfig, build_indexed_eval_loader, build_indexed_train_loader
from sycoca.distributed import rank, sum_over_ranks, world_size
from sycoca.evaluation.zero_shot import ClassCounts, accuracy_metrics
from sycoca.finetune.classification_model import (
    ImageClassifier,
    ImagePool,
    MixConfig,
    classification_parts,
    count_hits,
    pooled_width,
)
from sycoca.finetune.head import (
    build_class_head,
    check_options,
    fine_tuning_scales,
    load_head,
    read_settings,
    save_settings,
    to_pixels,
    whole_head_on_this_rank,
)
from sycoca.finetune.start import Start, StartConfig, start_from
from sycoca.log import logger
from sycoca.pretrained import Images, Pretrained, find_checkpoint, load, save_description
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.task import precision
from sycoca.train.validation import whole_on_this_rank
from sycoca.types import ConfigError

CHOOSE_BY = "top_1"
SETTINGS = "classes.json"


class ClassImagesConfig(Config):
    """Labelled images: folders and tars of `<class>/<file>` or, with `split`, `<split>/<class>/<file>`; or labelled shards."""

    images: list[str]
    split: str | None = None


class ClassificationDataConfig(IndexedConfig, ClassImagesConfig):
    """What is trained on. Size, means and deviations of the transform are the model's (start.image_size)."""


class EvaluateClassificationConfig(Config):
    """Held-out images; accuracy on them `every` steps and at the end, 0 is never."""

    images: list[str] = []
    split: str | None = None
    every: int = 1000
    batch_size: int = Field(default=128, ge=1)


class FinetuneClassificationConfig(TrainConfig):
    """One experiment."""

    start: StartConfig
    data: ClassificationDataConfig
    pool: ImagePool = "embedding"
    mix: MixConfig = MixConfig()
    evaluate: EvaluateClassificationConfig = EvaluateClassificationConfig()


class ClassifierSettings(Config):
    """What a checkpoint must say of its classifier for it to be built again."""

    class_names: list[str]
    pool: ImagePool


class Classifier:
    """A fine-tuned classifier ready for use."""

    def __init__(self, network: ImageClassifier, subject: Pretrained, class_names: Sequence[str]):
        self.network, self.subject, self.class_names = network, subject, tuple(class_names)

    @torch.no_grad()
    def logits(self, images: Images) -> Tensor:
        """BN float32, N classes. Images are PIL images, or a BCHW tensor that the checkpoint's transform made."""
        return self.network.logits(to_pixels(images, self.subject))

    def classify(self, images: Images) -> list[str]:
        """The most probable class of each image."""
        return [self.class_names[place] for place in self.logits(images).argmax(1).tolist()]


def load_classifier(path: str | Path, *, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of a checkpoint folder, or of a run's best checkpoint. Raises CheckpointError."""
    folder = find_checkpoint(Path(path))
    settings = read_settings(ClassifierSettings, folder, SETTINGS, tool="tools/finetune_classification.py")
    subject = load(folder, device=device)
    network = build_network(subject, settings)
    load_head(network.head, folder)
    return Classifier(network.eval().to(device), subject, settings.class_names)


def build_network(
    subject: Pretrained, settings: ClassifierSettings, *, mix: MixConfig | None = None, is_bf16: bool = False
) -> ImageClassifier:
    """The subject's model under a new head."""
    num_classes = len(settings.class_names)
    head = build_class_head(pooled_width(subject.model, settings.pool), num_classes)
    return ImageClassifier(
        subject.model, head, pool=settings.pool, mix=mix or MixConfig(), num_classes=num_classes, is_bf16=is_bf16
    )


def finetune_classification(config: FinetuneClassificationConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and where the checkpoint is."""
    check(config)
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    records = load_class_records(config.data.images, split=config.data.split)
    logger.info("data: %d images of %d classes", len(records), len(records.class_names))
    start = start_from(config.start, parts=classification_parts(config.pool), transform=config.data.transform)
    return run_job(config, build_job(config, start, records), accelerator)


def check(config: FinetuneClassificationConfig) -> None:
    """What the parts cannot check alone. Raises ConfigError."""
    check_options(config, config.data)
    if config.mix.is_mixing and config.data.batch_size % 2:
        raise ConfigError(f"data.batch_size: {config.data.batch_size} images cannot be mixed in pairs; make it even")


def build_job(config: FinetuneClassificationConfig, start: Start, records: ClassRecords) -> Job:
    """The classifier with its data and its evaluation."""
    data = config.data.model_copy(update={"transform": start.config.transform})
    settings = ClassifierSettings(class_names=list(records.class_names), pool=config.pool)
    subject = Pretrained(start.model, start.tokenizer, start.config)
    network = build_network(subject, settings, mix=config.mix, is_bf16=config.run.is_bf16)

    def load_batches(position: Any) -> Iterable[Any]:
        return build_indexed_train_loader(
            records, data, tokenizer=start.tokenizer, seed=config.run.seed, rank=rank(), world_size=world_size(),
            resume=position,
        )  # fmt: skip

    def describe(folder: Path) -> None:
        save_description(folder, start.tokenizer, start.config)
        save_settings(settings, folder / SETTINGS)

    evaluation = None
    if config.evaluate.images:
        measure = build_evaluation(config.evaluate, data, Classifier(network, subject, settings.class_names))
        evaluation = Evaluation(measure, config.evaluate.every, CHOOSE_BY)
    scales = fine_tuning_scales(start.model, network.head, config.optim)
    return Job(network, load_batches, describe, evaluation=evaluation, layer_scales=scales)


def build_evaluation(
    config: EvaluateClassificationConfig, data: IndexedConfig, classifier: Classifier
) -> Callable[[], dict[str, float]]:
    """A function that measures the classifier as it stands, on all ranks: top-1, top-5, mean per class, in percent."""
    records = load_class_records(config.images, split=config.split, class_names=classifier.class_names)
    network = classifier.network

    def evaluate() -> dict[str, float]:
        was_training = network.training
        network.eval()
        loader = build_indexed_eval_loader(
            records, data, tokenizer=classifier.subject.tokenizer, rank=rank(), world_size=world_size(),
            batch_size=config.batch_size,
        )  # fmt: skip
        with precision(classifier.subject.device, is_bf16=network.is_bf16):
            figures = measure_accuracy(whole_classifier_on_this_rank(classifier), loader)
        network.train(was_training)
        return figures

    return evaluate


def whole_classifier_on_this_rank(classifier: Classifier) -> Classifier:
    """The classifier itself; under ZeRO-3 and FSDP2 a copy of it with all weights. Every rank must call it."""
    subject = whole_on_this_rank(classifier.subject)
    if subject is classifier.subject:
        return classifier
    pool, class_names = classifier.network.pool, classifier.class_names
    network = build_network(subject, ClassifierSettings(class_names=list(class_names), pool=pool))
    width = pooled_width(subject.model, pool)
    network.head = whole_head_on_this_rank(classifier.network.head, lambda: build_class_head(width, len(class_names)))
    return Classifier(network.eval(), subject, class_names)


@torch.no_grad()
def measure_accuracy(classifier: Classifier, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`top_1`, `top_5`, `mean_per_class` in percent and `num_images`, over this rank's batches and all other ranks'."""
    device = classifier.subject.device
    count_3N = torch.zeros((3, len(classifier.class_names)), dtype=torch.int64, device=device)
    for batch in batches:
        count_3N += count_hits(classifier.logits(batch["image"]), batch["target"].to(device))
    return accuracy_metrics(ClassCounts(*sum_over_ranks(count_3N)))
