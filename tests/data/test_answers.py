"""The official normal form, soft targets by the official accuracy, and the vocabulary."""

import json
from pathlib import Path

import pytest

from sycoca.data.answers import (
    AnswerVocabulary,
    build_vocabulary,
    leave_one_out_accuracy,
    normalise_answer,
    read_vocabulary,
)
from sycoca.types import DataError


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  The\tCat\n", "cat"),
        ("An apple, a pear", "apple pear"),
        ("Two", "2"),
        ("none", "0"),
        ("ten eleven", "10 eleven"),
        ("yes!", "yes"),
        ("well-known", "well known"),
        ("well- known", "well known"),
        ("black/white", "black white"),
        ("black/ white/red", "black whitered"),  # a mark that stands beside a space somewhere goes everywhere
        ("1,000 men/women", "1000 menwomen"),  # a number's comma takes all marks
        ("mr. smith", "mr smith"),
        ("2.5", "2.5"),
        ("5.", "5"),
        ("dont", "don't"),
        ("youd've", "you'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("it's", "it's"),
        ("the", ""),
        ("." * 40, "." * 8),  # the official code passes a flag, 32, as the number of periods to remove
    ],
)
def test_the_official_normal_form(answer: str, expected: str):
    assert normalise_answer(answer) == expected


@pytest.mark.parametrize(("number", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people_score_in_steps_of_three_tenths(number: int, expected: float):
    assert leave_one_out_accuracy(number, 10) == pytest.approx(expected)


def test_the_leave_one_out_mean_is_that_of_the_subsets():
    for num_answers in (4, 5, 10):
        for number in range(num_answers + 1):
            given = [True] * number + [False] * (num_answers - number)
            subsets = [sum(given[:out] + given[out + 1 :]) for out in range(num_answers)]
            expected = sum(min(1, matches / 3) for matches in subsets) / num_answers
            assert leave_one_out_accuracy(number, num_answers) == pytest.approx(expected)


def test_soft_targets_count_normal_forms_and_leave_unknown_answers_out():
    vocabulary = AnswerVocabulary(["dog", "2", "cat"])
    answers = ["a dog", "Dog", "two", "2", "two!", "cat", "horse", "horse", "horse", "horse"]
    expected = {0: 0.6, 1: 0.9, 2: 0.3}
    assert vocabulary.soft_targets(answers) == pytest.approx(expected)
    assert vocabulary.soft_targets(["horse"] * 10) == {}


def test_a_vocabulary_takes_frequent_answers_first_and_spells_them_as_most_people_do():
    answers = ["two"] * 3 + ["2"] * 2 + ["A red car"] * 4 + ["yes"] * 5 + ["rare"] * 2 + ["the"] * 9
    vocabulary = build_vocabulary(answers, min_count=3)
    assert vocabulary.answers == ("two", "yes", "A red car")  # "two" and "2" are one answer, five times, as is "yes"
    assert vocabulary.find("2") == vocabulary.find("Two.") == 0
    assert vocabulary.find("red car") == 2
    assert vocabulary.find("rare") is vocabulary.find("the") is None
    assert len(build_vocabulary(answers, min_count=2)) == 4


def test_an_empty_vocabulary_is_an_error():
    with pytest.raises(DataError, match="without answers; lower min_count"):
        build_vocabulary(["yes", "no"], min_count=2)
    with pytest.raises(DataError, match="'no' is empty or occurs twice"):
        AnswerVocabulary(["yes", "no", "no"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "yes\n\n  red car \nno\n"),
        ("a.json", json.dumps(["yes", "red car", "no"])),
        ("a.json", json.dumps({"no": 2, "yes": 0, "red car": 1})),
    ],
)
def test_published_lists_are_read_in_their_order(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    assert read_vocabulary(tmp_path / name).answers == ("yes", "red car", "no")


def test_a_saved_vocabulary_comes_back(tmp_path: Path):
    vocabulary = AnswerVocabulary(["café", 'so "quoted"', "2"])
    vocabulary.save(tmp_path / "answers.json")
    assert read_vocabulary(tmp_path / "answers.json").answers == vocabulary.answers


@pytest.mark.parametrize("text", ["{", "3", '{"yes": 1, "no": 2}', "[1, 2]", "[]"])
def test_a_broken_vocabulary_is_explained(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError):
        read_vocabulary(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such answer vocabulary"):
        read_vocabulary(tmp_path / "b.json")
