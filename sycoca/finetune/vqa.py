"""Fine-tuning for visual question answering: from a checkpoint and questions with answers to a model that answers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sycoca.config import Config
from sycoca.data.answers import VQA_V2_MIN_COUNT, AnswerVocabulary, build_vocabulary, read_vocabulary
from sycoca.data.indexed import IndexedConfig, build_indexed_eval_loader, build_indexed_train_loader
from sycoca.data.readers import read_rows
from sycoca.data.vqa import AnyVqaSource, VqaData, VqaFiles, VqaRecords, VqaScenes, read_annotations, read_vqa
from sycoca.distributed import rank, world_size
from sycoca.evaluation.vqa import gather_predictions, read_results, score_vqa
from sycoca.finetune.head import (
    build_answer_head,
    check_options,
    fine_tuning_scales,
    load_head,
    read_settings,
    save_settings,
    to_pixels,
    whole_head_on_this_rank,
)
from sycoca.finetune.start import Start, StartConfig, start_from
from sycoca.finetune.vqa_model import VQA_PARTS, AnswerClassifier, AnswerWriter, check_room
from sycoca.log import logger
from sycoca.pretrained import Images, Pretrained, find_checkpoint, load, save_description
from sycoca.train.run import Evaluation, Job, TrainConfig, run_job, start_engine
from sycoca.train.task import precision
from sycoca.train.validation import whole_on_this_rank
from sycoca.types import ConfigError

CHOOSE_BY = "accuracy"
SETTINGS = "answers.json"
Mode = Literal["classify", "generate"]
"""Choose among known answers, or write any answer token by token."""


class VqaDataConfig(IndexedConfig):
    """What is trained on; `max_tokens` is the longest question. Size, means and deviations of the transform are the model's."""

    sources: list[AnyVqaSource]
    questions_per_image: int = Field(default=1, ge=1)
    """Up to so many questions on one image, and one crop of it, stand side by side in a batch: it is encoded once for them."""


class AnswersConfig(Config):
    """The answers that are learnt."""

    file: str | None = None
    """A published list (JSON, or one a line); null: those of the training questions."""
    min_count: int = Field(default=VQA_V2_MIN_COUNT, ge=1)
    """Training questions with that main answer, for it to be learnt; 9 gives VQA v2's 3,129."""
    max_tokens: int = Field(default=8, ge=2)
    """Longest answer written, end token counted; `generate` only."""


class EvaluateVqaConfig(Config):
    """Held-out questions; the official accuracy on them `every` steps and at the end, 0 is never."""

    sources: list[AnyVqaSource] = []
    every: int = 1000
    batch_size: int = Field(default=128, ge=1)


class FinetuneVqaConfig(TrainConfig):
    """One experiment."""

    start: StartConfig
    data: VqaDataConfig
    mode: Mode = "classify"
    answers: AnswersConfig = AnswersConfig()
    evaluate: EvaluateVqaConfig = EvaluateVqaConfig()


class VqaSettings(Config):
    """What a checkpoint must say of its answers for it to be built again."""

    mode: Mode
    answers: list[str]
    normalisation: Literal["vqa_v2"] = "vqa_v2"
    """How answers are told apart: data/answers.py, `normalise_answer`."""
    max_question_tokens: int
    max_answer_tokens: int


class VqaAnswerer:
    """A fine-tuned model ready to answer."""

    def __init__(self, network: AnswerClassifier | AnswerWriter, subject: Pretrained, settings: VqaSettings):
        self.network, self.subject, self.settings = network, subject, settings

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """One answer a question, about the image in its place; a question that is too long is cut.

        Images are PIL images, or a BCHW tensor that the checkpoint's transform made.
        """
        assert len(images) == len(questions), f"expected an image a question, found {len(images)} and {len(questions)}"
        if not questions:
            return []
        token_BL, length_B = self.subject.tokenizer.tokenize(list(questions), self.settings.max_question_tokens)
        return self.answer_tokens(to_pixels(images, self.subject), token_BL, length_B, torch.arange(len(questions)))

    def answer_tokens(self, image_NCHW: Tensor, token_BL: Tensor, length_B: Tensor, image_row_B: Tensor) -> list[str]:
        """As `answer`, of transformed images, tokenised questions and the row of the image that each is about."""
        return self.network.answer(*(t.to(self.subject.device) for t in (image_NCHW, token_BL, length_B, image_row_B)))


def load_vqa(path: str | Path, *, device: torch.device | str = "cpu") -> VqaAnswerer:
    """The model of a checkpoint folder, or of a run's best checkpoint. Raises CheckpointError."""
    folder = find_checkpoint(Path(path))
    settings = read_settings(VqaSettings, folder, SETTINGS, tool="tools/finetune_vqa.py")
    subject = load(folder, device=device)
    network = build_network(subject, settings)
    if isinstance(network, AnswerClassifier):
        load_head(network.head, folder)
    return VqaAnswerer(network.eval().to(device), subject, settings)


def build_network(
    subject: Pretrained, settings: VqaSettings, *, is_bf16: bool = False
) -> AnswerClassifier | AnswerWriter:
    """The subject's model under a new head, or as it is to write answers."""
    if settings.mode == "generate":
        return AnswerWriter(
            subject.model, subject.tokenizer, settings.answers, max_answer_tokens=settings.max_answer_tokens, is_bf16=is_bf16
        )
    head = build_answer_head(subject.model, len(settings.answers))
    return AnswerClassifier(subject.model, head, settings.answers, is_bf16=is_bf16)


def finetune_vqa(config: FinetuneVqaConfig) -> dict[str, float | str | int]:
    """Train as `config` says, on all ranks; gives the last evaluation's figures and where the checkpoint is."""
    check_options(config, config.data)
    accelerator = start_engine(config, batch_size=config.data.batch_size)
    start = start_from(config.start, parts=VQA_PARTS, transform=config.data.transform)
    num_answer_tokens = config.answers.max_tokens if config.mode == "generate" else 0
    check_room(start.model, num_question_tokens=config.data.max_tokens, num_answer_tokens=num_answer_tokens)
    data = read_answered(config.data.sources, "data.sources")
    answers, num_together = choose_answers(config.answers, data), config.data.questions_per_image
    return run_job(config, build_job(config, start, VqaRecords(data, answers, questions_per_image=num_together)), accelerator)


def read_answered(sources: Sequence[AnyVqaSource], name: str) -> VqaData:
    """Questions whose answers are known. Raises ConfigError, with the field's name, where some are not."""
    data = read_vqa(sources)
    unknown = next((question for question in data.questions if question.question_id not in data.annotations), None)
    if unknown is not None:
        raise ConfigError(f"{name}: question {unknown.question_id} has no answers; name the annotations of each source")
    return data


def choose_answers(config: AnswersConfig, data: VqaData) -> AnswerVocabulary:
    """The answers to learn. Raises DataError for a file that is no list of answers, and where none is frequent enough."""
    if config.file is not None:
        return read_vocabulary(Path(config.file))
    main_answers = (data.annotations[question.question_id].main_answer for question in data.questions)
    return build_vocabulary(main_answers, min_count=config.min_count)


def build_job(config: FinetuneVqaConfig, start: Start, records: VqaRecords) -> Job:
    """The network with its data and its evaluation."""
    data = config.data.model_copy(update={"transform": start.config.transform})
    settings = VqaSettings(
        mode=config.mode, answers=list(records.vocabulary.answers), max_question_tokens=config.data.max_tokens,
        max_answer_tokens=config.answers.max_tokens,
    )  # fmt: skip
    subject = Pretrained(start.model, start.tokenizer, start.config)
    network = build_network(subject, settings, is_bf16=config.run.is_bf16)

    def load_batches(position: Any) -> Iterable[Any]:
        return build_indexed_train_loader(
            records, data, tokenizer=start.tokenizer, seed=config.run.seed, rank=rank(), world_size=world_size(),
            resume=position,
        )  # fmt: skip

    def describe(folder: Path) -> None:
        save_description(folder, start.tokenizer, start.config)
        save_settings(settings, folder / SETTINGS)

    evaluation = None
    if config.evaluate.sources:
        measure = build_evaluation(config.evaluate, data, VqaAnswerer(network, subject, settings))
        evaluation = Evaluation(measure, config.evaluate.every, CHOOSE_BY)
    head = network.head if isinstance(network, AnswerClassifier) else None
    return Job(
        network, load_batches, describe, evaluation=evaluation,
        layer_scales=fine_tuning_scales(start.model, head, config.optim),
    )  # fmt: skip


def build_evaluation(
    config: EvaluateVqaConfig, data: IndexedConfig, answerer: VqaAnswerer
) -> Callable[[], dict[str, float]]:
    """A function that measures the answerer as it stands, on all ranks: the official accuracy, in percent."""
    questions = read_answered(config.sources, "evaluate.sources")
    records = VqaRecords(questions, AnswerVocabulary(answerer.settings.answers))
    network = answerer.network

    def evaluate() -> dict[str, float]:
        was_training = network.training
        network.eval()
        with precision(answerer.subject.device, is_bf16=network.is_bf16):
            answers = answer_records(whole_answerer_on_this_rank(answerer), records, data, batch_size=config.batch_size)
        network.train(was_training)
        return score_vqa(answers, questions.annotations)

    return evaluate


def answer_records(
    answerer: VqaAnswerer, records: VqaRecords, data: IndexedConfig, *, batch_size: int
) -> dict[int, str]:
    """The answer to every question by its id, on every rank; each answers a share. Empty where an image cannot be read."""
    loader = build_indexed_eval_loader(
        records, data, tokenizer=answerer.subject.tokenizer, rank=rank(), world_size=world_size(), batch_size=batch_size
    )
    own: dict[int, str] = {}
    for batch in loader:
        answers = answerer.answer_tokens(batch["image"], batch["token"], batch["length"], batch["image_row"])
        own |= zip(map(int, batch["key"]), answers, strict=True)
    found = gather_predictions(own)
    ids = [records.question_id(index) for index in range(len(records))]
    if len(found) < len(ids):
        logger.warning("%d of %d questions have no answer: their images cannot be read", len(ids) - len(found), len(ids))
    return {question_id: found.get(question_id, "") for question_id in ids}


def whole_answerer_on_this_rank(answerer: VqaAnswerer) -> VqaAnswerer:
    """The answerer itself; under ZeRO-3 and FSDP2 a copy of it with all weights. Every rank must call it."""
    subject = whole_on_this_rank(answerer.subject)
    if subject is answerer.subject:
        return answerer
    network = build_network(subject, answerer.settings)
    if isinstance(network, AnswerClassifier) and isinstance(answerer.network, AnswerClassifier):
        num_answers = len(answerer.settings.answers)
        network.head = whole_head_on_this_rank(answerer.network.head, lambda: build_answer_head(subject.model, num_answers))
    return VqaAnswerer(network.eval().to(subject.device), subject, answerer.settings)


def evaluate_source(
    answerer: VqaAnswerer, source: VqaFiles | VqaScenes, *, batch_size: int
) -> tuple[dict[int, str], dict[str, float]]:
    """Every answer by question id, and the figures: the official accuracy where answers are known; the same on every rank."""
    questions = read_vqa([source])
    settings = answerer.settings
    transform = answerer.subject.config.transform
    data = IndexedConfig(batch_size=batch_size, max_tokens=settings.max_question_tokens, transform=transform)
    records = VqaRecords(questions, AnswerVocabulary(settings.answers))
    answers = answer_records(answerer, records, data, batch_size=batch_size)
    if not questions.annotations:
        return answers, {"num_questions": float(len(answers))}
    return answers, score_vqa(answers, questions.annotations)


def score_file(predictions: Path, *, annotations: Path, questions: str | None) -> dict[str, float]:
    """The official accuracy of a results file; with `questions`, of the annotations of those only. Raises DataError."""
    known = read_annotations(annotations)
    if questions is not None:
        asked = {row["question_id"] for row in read_rows(Path(questions), "questions", needed={"question_id"})}
        known = {question_id: annotation for question_id, annotation in known.items() if question_id in asked}
    return score_vqa(read_results(predictions), known)
