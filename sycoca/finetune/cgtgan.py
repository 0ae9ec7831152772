"""Fits CgT-GAN: the generator learns to write from text embeddings alone, then from images against a discriminator.

Images and corpus come as stored embeddings, and which image a sentence was written for is never read. The paper's tasks are
choices of data: ZS-IC has sentences that nobody wrote for images, In-UIC the images' own with the pairs broken, Cross-UIC those
of another data set.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from sycoca.captioners.captioner import write_fit
from sycoca.captioners.cgtgan import CgTGan, CgTGanConfig, Generator
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.captioners.text_rows import TextRows
from sycoca.captioners.transform import fit_transform
from sycoca.config import Config
from sycoca.distributed import rank, world_size
from sycoca.finetune.closed_form import PairsConfig
from sycoca.finetune.corpus import Corpus, CorpusConfig
from sycoca.finetune.corpus_fluency import UNPAIRED, Unpaired, report_selections
from sycoca.finetune.discriminator import DiscriminatorConfig, build_discriminator
from sycoca.finetune.numbered import Collate, NumberedBatches, Order
from sycoca.finetune.self_critical import evaluating
from sycoca.finetune.stored_captioning import CHOOSE_BY, EvaluateStoredConfig, StoredImages, open_held_out
from sycoca.finetune.text_gan import AdversarialTask, PolicyConfig, ReconstructionTask
from sycoca.finetune.text_rewards import RewardConfig, build_semantic
from sycoca.log import logger
from sycoca.pretrained import find_checkpoint, load_weights
from sycoca.train.optim import OptimConfig
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine, train_job
from sycoca.train.task import precision
from sycoca.types import ConfigError

LoadBatches = Callable[[Any], Iterable[Any]]
"""This rank's endless batches from a position, or from the start."""
INITIALISE = "initialise"
"""In the run's folder: the run from text alone."""


class InitialiseConfig(Config):
    """Training from text alone, before images come in. `optim.num_steps: 0` leaves it out."""

    optim: OptimConfig
    batch_size: int = Field(default=64, ge=1)


class CgTGanFit(TrainConfig):
    """One experiment; `run.folder` is also the captioner's. `optim` is of both players."""

    encoder: str
    """As `load_encoder` takes it."""
    pairs: PairsConfig
    """Images; captions of the training split are not read, those of the held-out one measure."""
    corpus: CorpusConfig = CorpusConfig()
    captioner: CgTGanConfig
    initialise: InitialiseConfig
    discriminator: DiscriminatorConfig
    discriminator_lr_scale: float = Field(default=1.0, gt=0)
    """Factor of the discriminator's learning rate."""
    reward: RewardConfig = RewardConfig()
    policy: PolicyConfig = PolicyConfig()
    batch_size: int = Field(default=64, ge=1)
    """Images a process and step."""
    select: Literal["paired", "unpaired"] = "unpaired"
    """What chooses the checkpoint: CIDEr on held-out pairs (the authors' way), or a figure without pairs; both are reported."""
    evaluate: EvaluateStoredConfig = EvaluateStoredConfig()


def fit_cgtgan(config: CgTGanFit) -> dict[str, Any]:
    """Train on all ranks and save the captioner. Raises ConfigError, DataError, CheckpointError."""
    accelerator = start_engine(config, batch_size=config.batch_size)
    check(config, accelerator)
    encoder = load_encoder(config.encoder, accelerator.device)
    train = config.pairs.open(encoder)
    rows = config.corpus.read(encoder, train)
    logger.info("cgtgan: %d images and %d sentences, whose pairing is not read", len(train), len(rows.rows))
    images = open_held_out(config.pairs, config.evaluate, encoder)
    started = time.perf_counter()
    rate = build_semantic(config.reward, encoder, rows)
    subject, corpus = build_captioner(config, encoder, train, rows)
    unpaired = Unpaired(rate, corpus.texts)
    initial = initialise(config, subject, corpus, accelerator, partial(build_evaluation, config, images, unpaired))
    discriminator = build_discriminator(config.discriminator, subject.generator.lm)
    task = AdversarialTask(
        subject.generator, discriminator, rate, reward=config.reward, policy=config.policy, is_bf16=config.run.is_bf16
    )
    load_batches = order_batches(
        config, train.keys, partial(corpus.collate_beside, train, subject.image_transform), config.batch_size
    )
    job = build_job(config, task, load_batches, build_evaluation(config, images, unpaired, subject))
    figures = run_job(config, job, accelerator)
    seconds = time.perf_counter() - started - (images.seconds if images is not None else 0.0)
    folder = Path(config.run.folder)
    if accelerator.is_main_process:  # the process group has ended: no rank to ask for
        source = find_checkpoint(folder)
        load_weights(task.cpu(), load_file(source / "model.safetensors"), source=str(source))
        subject.save(folder)
        write_fit(folder, {"fit_seconds": seconds})
    chosen = report_selections(folder / "log.jsonl", {"paired": CHOOSE_BY, "unpaired": UNPAIRED})
    measured = report_selections(folder / INITIALISE / "log.jsonl", {"last": "step"})  # an earlier launch may have done it
    initial = measured.get("last", {}) | initial
    return {"captioner": str(folder), "fit_seconds": seconds, **figures, "initialised": initial, "selected": chosen}


def check(config: CgTGanFit, accelerator: Accelerator) -> None:
    """What the parts cannot check alone. Raises ConfigError."""
    for plan in (config.optim, config.initialise.optim):
        if config.run.compile or plan.num_chunks > 1 or plan.layer_decay != 1 or config.run.grad_norms_every:
            raise ConfigError("leave out run.compile and grad_norms_every, optim.num_chunks and layer_decay: not for CgT-GAN")
    if accelerator.state.deepspeed_plugin is not None or accelerator.is_fsdp2:
        raise ConfigError("CgT-GAN trains in two runs of one launch: use one process or DDP, not DeepSpeed or FSDP2")


def build_captioner(
    config: CgTGanFit, encoder: FrozenEncoder, images: EmbeddingStore, rows: TextRows
) -> tuple[CgTGan, Corpus]:
    """A new captioner and what it learns from; embeddings of images and of sentences are transformed apart."""
    kinds = config.captioner.transform
    image_transform = fit_transform(kinds, lambda: (block.image_NE for block in images.blocks()))
    text_transform = fit_transform(kinds, lambda: [torch.from_numpy(rows.embedding_SE)])
    subject = CgTGan(encoder, build_generator(config, encoder), config.captioner, image_transform)
    corpus = Corpus(rows, subject.generator.lm, max_tokens=config.policy.max_tokens, transform=text_transform)
    return subject, corpus


def build_generator(config: CgTGanFit, encoder: FrozenEncoder) -> Generator:
    """The language model that is named with a new prefix, all of it to train."""
    lm = config.captioner.lm.load(encoder.device)
    return Generator(lm, encoder.embed_width, num_prefix=config.captioner.num_prefix)


def initialise(
    config: CgTGanFit, subject: CgTGan, corpus: Corpus, accelerator: Accelerator,
    evaluate: Callable[[CgTGan], Evaluation | None],
) -> dict[str, Any]:  # fmt: skip
    """Train the generator from text alone, in a run of its own; gives its figures, by which nothing is chosen."""
    plan = config.initialise
    if plan.optim.num_steps == 0:
        return {}
    folder = str(Path(config.run.folder) / INITIALISE)
    resume = config.run.resume if config.run.resume == "none" else "auto"
    experiment = TrainConfig(run=config.run.model_copy(update={"folder": folder, "resume": resume}), optim=plan.optim)
    task = ReconstructionTask(subject.generator, is_bf16=config.run.is_bf16)
    keys = [str(number) for number in range(len(corpus))]
    evaluation = evaluate(subject)
    if evaluation is not None:
        evaluation = replace(evaluation, every=plan.optim.num_steps)
    job = Job(task, order_batches(config, keys, corpus.collate, plan.batch_size), describe=_nothing, evaluation=evaluation)
    figures = train_job(experiment, job, accelerator)
    # a new module: DDP's hooks of the first run would stay on the old one
    trained, subject.generator = subject.generator, build_generator(config, subject.encoder)
    subject.generator.load_state_dict(trained.state_dict())
    accelerator.free_memory()
    return figures


def build_job(
    config: CgTGanFit, task: AdversarialTask, load_batches: LoadBatches, evaluation: Evaluation | None
) -> Job:
    """Both players with images and sentences."""
    scales = dict.fromkeys(task.discriminator.parameters(), config.discriminator_lr_scale)
    return Job(task, load_batches, describe=_nothing, evaluation=evaluation, layer_scales=scales)


def order_batches(config: CgTGanFit, keys: Sequence[str], collate: Collate, batch_size: int) -> LoadBatches:
    """This rank's endless batches, from a position that a checkpoint keeps."""

    def load_batches(position: Any) -> Iterable[Any]:
        return NumberedBatches(keys, collate, Order(config.run.seed, batch_size, rank(), world_size()), resume=position)

    return load_batches


def build_evaluation(
    config: CgTGanFit, images: StoredImages | None, unpaired: Unpaired, subject: CgTGan
) -> Evaluation | None:
    """Captions of the held-out images, against people's and against reward and corpus; chosen by as `select` says."""
    if images is None:
        return None
    held_out = images

    def write(row_N: Tensor, keys: Sequence[str]) -> list[str]:
        with precision(subject.encoder.device, is_bf16=config.run.is_bf16):
            return [written.caption for written in subject.write(held_out.store.image_rows(row_N.tolist()))]

    def measure() -> dict[str, float]:
        with evaluating(subject.generator):
            figures, captioned = held_out.measure(write)
        started = time.perf_counter()
        keys = list(captioned.predictions)
        image_BE = held_out.store.image_rows([held_out.store.row_of_key[key] for key in keys]).to(subject.encoder.device)
        figures |= unpaired.measure(keys, image_BE, list(captioned.predictions.values()))
        held_out.seconds += time.perf_counter() - started
        return figures

    return Evaluation(measure, config.evaluate.every, CHOOSE_BY if config.select == "paired" else UNPAIRED)


def _nothing(folder: Path) -> None:
    """A checkpoint's weights are all that the captioner's folder is made of."""
