"""VQA data: the official files and the embedded scenes; every disagreement between the files is said in one line."""

import json
import logging
import os
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from shard_maker import encode_image, write_shard

from sycoca.data.answers import AnswerVocabulary, build_vocabulary
from sycoca.data.indexed import IndexedConfig, build_indexed_train_loader
from sycoca.data.scenes import write_scenes
from sycoca.data.tokenizer import build_tokenizer
from sycoca.data.vqa import Annotation, VqaFiles, VqaRecords, VqaScenes, read_annotations, read_vqa
from sycoca.types import DataError

DATA = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data"))
QUESTIONS = [
    {"question_id": 70, "image_id": 4, "question": "what is it?"},
    {"question_id": 71, "image_id": 5, "question": "how many?"},
    {"question_id": 90, "image_id": 4, "question": "is it red?"},
]
ANSWERS = {70: ["a cat"] * 6 + ["dog"] * 3 + ["horse"], 71: ["two"] * 2 + ["2"] * 8, 90: ["maybe"] * 10}


def annotate(question_id: int, answers: list[str]) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "image_id": 0,
        "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)],
        "multiple_choice_answer": answers[0],
        "question_type": "what is",
        "answer_type": "other",
    }


def make_source(
    folder: Path, *, questions: list[Any] | None = None, annotations: list[Any] | None = None, **changes: Any
) -> VqaFiles:
    """Two images and three questions, or what is given in their place."""
    (folder / "images").mkdir(exist_ok=True)
    for number in (4, 5):
        (folder / "images" / f"COCO_x_{number:04d}.jpg").write_bytes(encode_image(number))
    rows = QUESTIONS if questions is None else questions
    people = [annotate(*item) for item in ANSWERS.items()] if annotations is None else annotations
    (folder / "q.json").write_text(json.dumps({"info": {}, "questions": rows}))
    (folder / "a.json").write_text(json.dumps({"annotations": people}))
    tree = {
        "questions": str(folder / "q.json"),
        "annotations": str(folder / "a.json"),
        "images": [str(folder / "images")],
        "image_name": "COCO_x_{:04d}.jpg",
    }
    return VqaFiles.model_validate({**tree, **changes})


def test_records_hold_question_image_and_soft_targets(tmp_path: Path):
    records = VqaRecords(read_vqa([make_source(tmp_path)]), AnswerVocabulary(["2", "cat", "dog"]))
    assert [records.key(i) for i in range(3)] == ["70", "71", "90"]
    assert records.question_id(2) == 90
    assert records.text(1, Random(0)) == "how many?"
    assert records.image_name(1) == "COCO_x_0005.jpg"
    assert records.image(0) == records.image(2) == encode_image(4)
    target_BN = np.stack([records.target(i) for i in range(3)])
    assert target_BN.dtype == np.float32
    assert np.allclose(target_BN, [[0, 1, 0.9], [1, 0, 0], [0, 0, 0]])
    assert records.num_without_target == 1


def test_annotations_keep_what_the_score_needs(tmp_path: Path):
    data = read_vqa([make_source(tmp_path)])
    assert data.annotations[71] == Annotation(tuple(ANSWERS[71]), "two", "what is", "other")
    assert data.annotations == read_annotations(tmp_path / "a.json")


def test_several_sources_find_their_own_images(tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = make_source(tmp_path / "one"), make_source(
        tmp_path / "two", questions=[{**QUESTIONS[0], "question_id": 5}], annotations=[annotate(5, ["cat"] * 10)]
    )
    (tmp_path / "two" / "images" / "COCO_x_0004.jpg").write_bytes(b"another")
    records = VqaRecords(read_vqa([first, second]), AnswerVocabulary(["cat"]))
    assert records.image(0) == encode_image(4)
    assert records.image(3) == b"another"
    assert records.image_N[0] == records.image_N[2]
    assert len({int(records.image_N[row]) for row in (0, 1, 3)}) == 3  # row 0 of the second source is another image
    with pytest.raises(DataError, match="question_id 70 occurs twice"):
        read_vqa([first, first])


def test_a_test_split_has_no_annotations_and_no_targets(tmp_path: Path):
    data = read_vqa([make_source(tmp_path, annotations=None).model_copy(update={"annotations": None})])
    records = VqaRecords(data, AnswerVocabulary(["cat"]))
    assert data.annotations == {}
    assert records.target(0).tolist() == [0]


def test_what_is_left_over_is_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any):
    monkeypatch.setattr(logging.getLogger("sycoca"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="sycoca"):
        VqaRecords(read_vqa([make_source(tmp_path, questions=QUESTIONS[:1])]), AnswerVocabulary(["bird"]))
    assert "1 questions on 1 images; 1 images of" in caplog.text
    assert "2 annotations belong to no question" in caplog.text
    assert "1 questions (100.0 %) have no answer among them" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, "expected questions, found none"),
        ({"questions": [{"question_id": 1, "question": "x"}]}, r"q\.json: questions\[0\]: expected the keys .*'image_id'"),
        ({"questions": [{**QUESTIONS[0], "question_id": "70"}]}, r"q\.json: expected a whole `question_id`"),
        ({"questions": [*QUESTIONS, {**QUESTIONS[0], "image_id": 5}]}, "question_id 70 occurs twice"),
        ({"questions": [{**QUESTIONS[0], "image_id": 8}]}, r"1 of 1 images are missing, first COCO_x_0008\.jpg"),
        ({"annotations": [annotate(70, ["x"] * 10)]}, r"a\.json: no annotation of 2 questions of .*q\.json, first 71"),
        ({"annotations": [annotate(70, ["x"] * 3)]}, r"answers of 10 people.*repeat a single answer 10 times"),
        ({"annotations": [{**annotate(70, ["x"] * 4), "answers": "x"}]}, r"annotations\[0\]: expected answers of 10 people"),
        ({"annotations": [annotate(70, ["x"] * 9)] * 2}, "question_id 70 has two annotations"),
        ({"annotations": [{"question_id": 70}]}, r"a\.json: annotations\[0\]: expected the keys .*'multiple_choice_answer'"),
        ({"image_name": "{:012d}{}.jpg"}, r"image_name .* cannot take image_id 4 .*COCO_train2014_\{:012d\}\.jpg"),
        ({"images": ["/nowhere/at/all"]}, "no folder and no tar of images"),
    ],
)
def test_what_does_not_fit_together_is_said_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message) as caught:
        read_vqa([make_source(tmp_path, **changes)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"annotations": []}', "a list 'questions', found annotations"), (None, "no such file")],
)
def test_a_broken_questions_file_is_explained(tmp_path: Path, text: str | None, message: str):
    source = make_source(tmp_path)
    if text is None:
        (tmp_path / "q.json").unlink()
    else:
        (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_vqa([source])


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError):
        VqaFiles.model_validate({"questions": "q", "images": ["i"], "image_name": "{}", "anotations": "a"})


def test_scenes_ask_questions_that_ten_people_agree_on(tmp_path: Path):
    write_scenes(tmp_path / "scenes", num_train=30, num_val=4, size=32, samples_per_shard=20)
    data = read_vqa([VqaScenes(shards=[str(tmp_path / "scenes" / "train-*.tar")])])
    assert len(data.questions) == len(data.annotations) > 90
    assert {(a.question_type, a.answer_type) for a in data.annotations.values()} >= {("count", "number"), ("exists", "yes/no")}
    vocabulary = build_vocabulary((a.main_answer for a in data.annotations.values()), min_count=1)
    records = VqaRecords(data, vocabulary)
    assert records.num_without_target == 0
    assert {records.target(i).max() for i in range(len(records))} == {1.0}
    assert records.image_name(0) == "train0000000.jpg"
    assert "two" in vocabulary.answers  # as it is spelled there: where all agree, nothing is normalised


def test_shards_without_questions_are_refused(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar", [("x.jpg", encode_image()), ("x.json", b'{"captions": []}')])
    with pytest.raises(DataError, match=r"a\.tar:x: its json has no `questions`"):
        read_vqa([VqaScenes(shards=[str(path)])])


def _real(name: str, split: str, image_name: str) -> VqaFiles:
    folder = DATA / name
    return VqaFiles(
        questions=str(folder / f"questions_{split}.json"),
        annotations=str(folder / f"annotations_{split}.json"),
        images=[str(folder / f"images_{split}.tar")],
        image_name=image_name,
    )


@pytest.mark.skipif(not (DATA / "daquar").exists(), reason="no real data at SYCOCA_DATA")
def test_daquar_trains():
    data = read_vqa([_real("daquar", "train", "daquar_train_{:012d}.jpg")])
    vocabulary = build_vocabulary((a.main_answer for a in data.annotations.values()), min_count=2)
    records = VqaRecords(data, vocabulary)
    assert len(records) == 6021
    assert vocabulary.answers[:3] == ("2", "table", "chair")
    config = IndexedConfig.model_validate({"batch_size": 4, "num_workers": 0, "transform": {"size": 32}})
    loader = build_indexed_train_loader(records, config, tokenizer=build_tokenizer("clip"), seed=0, rank=0, world_size=1)
    for batch in islice(loader, 2):
        assert batch["target"].shape == (4, len(vocabulary))
        assert batch["image"].shape == (4, 3, 32, 32)


@pytest.mark.skipif(not (DATA / "easy_vqa").exists(), reason="no real data at SYCOCA_DATA")
def test_easy_vqa_has_thirteen_answers():
    data = read_vqa([_real("easy_vqa", "val", "easyvqa_val_{:012d}.png")])
    vocabulary = build_vocabulary((a.main_answer for a in data.annotations.values()), min_count=9)
    records = VqaRecords(data, vocabulary)
    assert (len(records), len(vocabulary), records.num_without_target) == (3899, 13, 0)
