"""Questions on images with the answers of ten people: VQA v2's official files, or the embedded scenes' shards."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from random import Random
from sys import intern
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sycoca.config import Config
from sycoca.data.answers import MIN_ANSWERS, AnswerVocabulary
from sycoca.data.classes import list_tar_samples
from sycoca.data.image_store import ImageStore
from sycoca.data.packed import PackedTexts
from sycoca.data.readers import ImageLocation, index_tar, read_bytes, read_rows
from sycoca.log import logger
from sycoca.types import DataError

NUM_PEOPLE = 10
"""Answers to a question of VQA v2."""


class VqaFiles(Config):
    """VQA v2's official JSON files and their images; other keys in them are not read."""

    type: Literal["files"] = "files"
    questions: str
    annotations: str | None = None
    """None for a test split, whose answers are not known."""
    images: list[str]
    """Folders or tars; names are looked for in all of them."""
    image_name: str
    """The file of an `image_id`, in Python's format notation: VQA v2's is `COCO_train2014_{:012d}.jpg`."""


class VqaScenes(Config):
    """Shards of the embedded scenes; ten people are made to agree on the one right answer."""

    type: Literal["scenes"] = "scenes"
    shards: list[str]


AnyVqaSource = Annotated[VqaFiles | VqaScenes, Field(discriminator="type")]


class Annotation(NamedTuple):
    """What people answered. `main_answer` is the file's `multiple_choice_answer`; the types are the file's, maybe empty."""

    answers: tuple[str, ...]
    main_answer: str
    question_type: str
    answer_type: str


class Question(NamedTuple):
    """`row` is the image's, in the store of that number."""

    question_id: int
    text: str
    store: int
    row: int


@dataclass(frozen=True, slots=True)
class VqaData:
    """Everything read, as Python objects; `annotations` by question id, none where they are not known."""

    stores: list[ImageStore]
    questions: list[Question]
    annotations: dict[int, Annotation]


class VqaRecords:
    """Questions with soft targets over a vocabulary (`Records` of data/indexed.py).

    A question none of whose answers is in the vocabulary has no target: its row is 0; `num_without_target` counts them.
    In training up to `questions_per_image` questions on one image come one after the other.
    """

    def __init__(self, data: VqaData, vocabulary: AnswerVocabulary, *, questions_per_image: int = 1):
        self.vocabulary = vocabulary
        self.group_size = questions_per_image
        self._stores = data.stores
        self._text_N = PackedTexts(question.text for question in data.questions)
        self._id_N = np.array([question.question_id for question in data.questions], dtype=np.int64)
        self._store_N = np.array([question.store for question in data.questions], dtype=np.int32)
        self._row_N = np.array([question.row for question in data.questions], dtype=np.int64)
        _, self.image_N = np.unique(np.stack([self._store_N, self._row_N]), axis=1, return_inverse=True)
        targets = [_soft_targets(question, data.annotations, vocabulary) for question in data.questions]
        self._start_N = np.array(list(accumulate(map(len, targets), initial=0)), dtype=np.int64)
        self._place_K = np.array([place for target in targets for place in target], dtype=np.int32)
        self._score_K = np.array([score for target in targets for score in target.values()], dtype=np.float32)
        self.num_without_target = sum(not target for target in targets)
        logger.info(
            "vqa: %d questions, %d answers to choose from; %d questions (%.1f %%) have no answer among them",
            len(self), len(vocabulary), self.num_without_target, 100 * self.num_without_target / max(1, len(self)),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._text_N)

    def question_id(self, index: int) -> int:
        """As in the files; `key` is its decimal text."""
        return int(self._id_N[index])

    def key(self, index: int) -> str:
        """The question's id."""
        return str(self._id_N[index])

    def image_name(self, index: int) -> str:
        """The image's path in its source."""
        return self._stores[self._store_N[index]].name(int(self._row_N[index]))

    def image(self, index: int) -> bytes:
        """The image's file."""
        return self._stores[self._store_N[index]].read(int(self._row_N[index]))

    def text(self, index: int, generator: Random) -> str:
        """The question; nothing is drawn."""
        del generator
        return self._text_N[index]

    def target(self, index: int) -> NDArray[np.float32]:
        """The official accuracy of each answer of the vocabulary, in [0, 1]."""
        target_N = np.zeros(len(self.vocabulary), dtype=np.float32)
        own = slice(self._start_N[index], self._start_N[index + 1])
        target_N[self._place_K[own]] = self._score_K[own]
        return target_N


def read_vqa(sources: Sequence[VqaFiles | VqaScenes]) -> VqaData:
    """The questions of all sources, with what was answered.

    Raises DataError for a file or key that is not there, a question without image or annotation, an id that occurs twice.
    """
    data = VqaData([], [], {})
    for number, source in enumerate(sources):
        if isinstance(source, VqaFiles):
            store, questions, annotations = _read_files(source, number)
        else:
            store, questions, annotations = _read_scenes(source, number)
        data.stores.append(store)
        data.questions.extend(questions)
        data.annotations.update(annotations)
    ids, times = np.unique([question.question_id for question in data.questions], return_counts=True)
    if not len(ids):
        raise DataError("vqa: expected questions, found none")
    if times.max() > 1:
        raise DataError(f"vqa: question_id {ids[times.argmax()]} occurs twice in the questions read; expected each once")
    return data


def read_annotations(path: Path) -> dict[int, Annotation]:
    """The official annotations file, by question id. Raises DataError."""
    needed = {"question_id", "answers", "multiple_choice_answer", "question_type", "answer_type"}
    found: dict[int, Annotation] = {}
    for number, row in enumerate(read_rows(_existing(path), "annotations", needed=needed)):
        answers = row["answers"]
        is_list = isinstance(answers, list) and all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in answers)
        if not is_list or len(answers) < MIN_ANSWERS:
            raise DataError(
                f"{path}: annotations[{number}]: expected answers of {NUM_PEOPLE} people, each an object with a text answer, "
                f"found {str(answers)[:80]}; {MIN_ANSWERS} are the least, repeat a single answer {NUM_PEOPLE} times"
            )
        if row["question_id"] in found:
            raise DataError(f"{path}: question_id {row['question_id']} has two annotations")
        texts = tuple(intern(answer["answer"]) for answer in answers)  # most answers are given again and again
        found[row["question_id"]] = Annotation(texts, row["multiple_choice_answer"], row["question_type"], row["answer_type"])
    return found


def _read_files(source: VqaFiles, number: int) -> tuple[ImageStore, list[Question], dict[int, Annotation]]:
    path = Path(source.questions)
    rows = read_rows(_existing(path), "questions", needed={"question_id", "image_id", "question"})
    wrong = next((row for row in rows if type(row["question_id"]) is not int or not isinstance(row["question"], str)), None)
    if wrong is not None:
        raise DataError(f"{path}: expected a whole `question_id` and a text `question`, found {str(wrong)[:120]}")
    store = ImageStore(source.images)
    annotations = read_annotations(Path(source.annotations)) if source.annotations is not None else {}
    image_rows = _find_images(source, rows, store)
    questions = [Question(row["question_id"], row["question"], number, image_rows[row["image_id"]]) for row in rows]
    own = {number: annotations[number] for number in (row["question_id"] for row in rows) if number in annotations}
    missing = [row["question_id"] for row in rows if row["question_id"] not in own]
    if source.annotations is not None and missing:
        raise DataError(f"{source.annotations}: no annotation of {len(missing)} questions of {path}, first {missing[0]}")
    logger.info(
        "%s: %d questions on %d images; %d images of %s have no question, %d annotations belong to no question",
        path, len(questions), len(image_rows), len(store) - len(set(image_rows.values())), store.describe(),
        len(annotations) - len(own),
    )  # fmt: skip
    return store, questions, own


def _find_images(source: VqaFiles, rows: Sequence[Mapping[str, Any]], store: ImageStore) -> dict[Any, int]:
    """The row of each image id. Raises DataError for ids without an image."""
    names = {row["image_id"]: _name_image(source, row["image_id"]) for row in rows}
    found = {image_id: store.find(name) for image_id, name in names.items()}
    missing = [image_id for image_id, row in found.items() if row is None]
    if missing:
        raise DataError(
            f"{source.questions}: {len(missing)} of {len(found)} images are missing, first {names[missing[0]]}, in "
            f"{store.describe()} ({store.name(0)} is there); check image_name ({source.image_name}) and images"
        )
    return {image_id: row for image_id, row in found.items() if row is not None}


def _name_image(source: VqaFiles, image_id: Any) -> str:
    try:
        return source.image_name.format(image_id)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{source.questions}: image_name {source.image_name!r} cannot take image_id {image_id!r} ({error}); expected "
            "a pattern such as COCO_train2014_{:012d}.jpg for numbers, {}.jpg for texts"
        ) from error


def _read_scenes(source: VqaScenes, number: int) -> tuple[ImageStore, list[Question], dict[int, Annotation]]:
    store = ImageStore(source.shards)
    questions: list[Question] = []
    annotations: dict[int, Annotation] = {}
    ids = count()
    for place, path in enumerate(store.sources()):
        if path.is_dir():
            raise DataError(f"{path}: a folder without *.tar; name scenes' shards (tools/make_scenes.py writes them)")
        rows = {store.name(row): row for row in store.rows_of(place)}
        for sample in list_tar_samples(index_tar(path)):
            for asked in _questions_of(sample.members.get("json"), where=f"{path}:{sample.key}"):
                question_id = next(ids)
                questions.append(Question(question_id, asked["question"], number, rows[sample.image]))
                annotations[question_id] = _agree(asked["answer"], asked["type"])
    logger.info("%s: %d questions on %d scenes", store.describe(), len(questions), len({item.row for item in questions}))
    return store, questions, annotations


def _questions_of(member: ImageLocation | None, *, where: str) -> Iterator[dict[str, str]]:
    try:
        tree = json.loads(read_bytes(member)) if member is not None else None
    except ValueError as error:
        raise DataError(f"{where}: its json cannot be read ({error})") from error
    asked = tree.get("questions") if isinstance(tree, dict) else None
    needed = {"question", "answer", "type"}
    if not isinstance(asked, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in asked):
        raise DataError(f"{where}: its json has no `questions` with question, answer and type; are these scenes' shards?")
    yield from asked


def _agree(answer: str, question_type: str) -> Annotation:
    """Ten people who give one answer, with VQA v2's answer types."""
    answer_type = "number" if question_type == "count" else "yes/no" if answer in ("yes", "no") else "other"
    return Annotation((answer,) * NUM_PEOPLE, answer, question_type, answer_type)


def _soft_targets(
    question: Question, annotations: Mapping[int, Annotation], vocabulary: AnswerVocabulary
) -> dict[int, float]:
    annotation = annotations.get(question.question_id)
    return {} if annotation is None else vocabulary.soft_targets(annotation.answers)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path
