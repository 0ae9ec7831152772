"""The official VQA accuracy on cases worked by hand, and its result files."""

import json
import os
from pathlib import Path

import pytest

from sycoca.data.vqa import Annotation, read_annotations
from sycoca.evaluation.vqa import check_predictions, gather_predictions, read_results, score_answer, score_vqa, write_results
from sycoca.types import DataError

DATA = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data"))


def annotation(answers: list[str], *, question_type: str = "what is", answer_type: str = "other") -> Annotation:
    return Annotation(tuple(answers), answers[0], question_type, answer_type)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("yes", ["yes"] * 8 + ["no"] * 2, 1.0),
        ("no", ["yes"] * 8 + ["no"] * 2, 0.6),  # the example of the official repository's issue 1
        ("no", ["yes"] * 9 + ["no"], 0.3),
        ("no", ["yes"] * 7 + ["no"] * 3, 0.9),
        ("maybe", ["yes"] * 7 + ["no"] * 3, 0.0),
        ("Two!", ["2"] * 4 + ["3"] * 6, 1.0),  # people disagree: all answers are normalised
        ("a dog", ["the dog", "Dog.", "dog"] + ["cat"] * 7, 0.9),
        ("yes!", ["yes"] * 10, 0.0),  # people agree: nothing is normalised, not even case
        ("Yes", ["yes"] * 10, 0.0),
        ("the cat", ["the cat"] * 10, 1.0),
        ("cat", ["the cat"] * 10, 0.0),
        (" the\tcat\n", ["the cat "] * 10, 1.0),  # spaces around and line ends never count
        ("cat", ["cat"] * 5 + ["cat "] * 5, 1.0),  # spaces are no disagreement
    ],
)
def test_an_answer_scores_as_officially(prediction: str, answers: list[str], expected: float):
    assert score_answer(prediction, answers) == pytest.approx(expected)


def test_scores_are_means_in_percent_overall_and_by_type():
    annotations = {
        7: annotation(["yes"] * 10, question_type="is it", answer_type="yes/no"),
        3: annotation(["no"] * 9 + ["yes"], question_type="is it", answer_type="yes/no"),
        5: annotation(["cat"] * 6 + ["dog"] * 4, question_type="", answer_type="other"),
    }
    scores = score_vqa({3: "yes", 5: "bird", 7: "yes"}, annotations)
    assert scores == {
        "accuracy": pytest.approx(130 / 3),
        "answer_type/other": 0.0,
        "answer_type/yes/no": pytest.approx(65.0),
        "question_type/is it": pytest.approx(65.0),
        "num_questions": 3.0,
    }


def test_every_question_needs_an_answer_and_no_other():
    annotations = {number: annotation(["yes"] * 10) for number in (1, 2, 3)}
    with pytest.raises(DataError, match="no answer to 2 of 3 questions, first question_id 2"):
        score_vqa({1: "yes"}, annotations)
    with pytest.raises(DataError, match="1 answers to unknown questions, first question_id 9"):
        score_vqa({1: "yes", 2: "no", 3: "no", 9: "yes"}, annotations)
    with pytest.raises(DataError, match="found none"):
        check_predictions({}, [])


def test_results_are_written_in_the_official_format(tmp_path: Path):
    path = tmp_path / "results.json"
    write_results(path, {12: "café", 3: "yes"})
    assert json.loads(path.read_text()) == [{"question_id": 3, "answer": "yes"}, {"question_id": 12, "answer": "café"}]
    assert read_results(path) == {3: "yes", 12: "café"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("{}", "expected a list of objects with question_id and answer, found dict"),
        ('[{"question_id": "1", "answer": "x"}]', r"\[0\]: expected a whole question_id"),
        ('[{"question_id": 1}]', r"\[0\]: expected a whole question_id and a text answer"),
        ("[3]", r"\[0\]: expected a whole question_id and a text answer"),
        ('[{"question_id": 1, "answer": "x"}, {"question_id": 1, "answer": "y"}]', "question_id 1 is answered twice"),
    ],
)
def test_broken_results_are_explained(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "r.json")
    with pytest.raises(DataError, match="no such results file"):
        read_results(tmp_path / "none.json")


def test_ranks_bring_their_answers_together(monkeypatch: pytest.MonkeyPatch):
    assert gather_predictions({1: "yes"}) == {1: "yes"}
    monkeypatch.setattr("sycoca.evaluation.vqa.gather_objects", lambda own: [own, {2: "no"}])
    assert gather_predictions({1: "yes"}) == {1: "yes", 2: "no"}
    with pytest.raises(DataError, match="question_id 2 was answered on two ranks"):
        gather_predictions({2: "yes"})


@pytest.mark.skipif(not (DATA / "daquar").exists(), reason="no real data at SYCOCA_DATA")
def test_the_majority_answer_of_daquar_scores_little():
    annotations = read_annotations(DATA / "daquar" / "annotations_val.json")
    scores = score_vqa(dict.fromkeys(annotations, "2"), annotations)
    assert 3 < scores["accuracy"] < 6
    assert scores["answer_type/other"] < 1
    best = score_vqa({number: item.main_answer for number, item in annotations.items()}, annotations)
    assert best["accuracy"] > 99
