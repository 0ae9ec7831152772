"""VQA accuracy as the official evaluation computes it (GT-Vision-Lab/VQA, vqaEval.py), and its result files.

The pitfalls are its rules: answers are normalised, people's and the model's, only where the people disagree; comparison is then
exact; a question's score is the mean over the people, each left out in turn, of min(1, matches among the others / 3).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from sycoca.data.answers import clean_answer, leave_one_out_accuracy, normalise_answer
from sycoca.data.vqa import Annotation
from sycoca.distributed import gather_objects
from sycoca.types import DataError


def score_vqa(predictions: Mapping[int, str], annotations: Mapping[int, Annotation]) -> dict[str, float]:
    """`accuracy`, `answer_type/<type>`, `question_type/<type>` in percent, and `num_questions`; types named "" are left out.

    Both are by question id. Raises DataError for questions without an answer, and answers to other questions.
    """
    check_predictions(predictions, annotations)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for question_id, annotation in annotations.items():
        score = 100 * score_answer(predictions[question_id], annotation.answers)
        by_name["accuracy"].append(score)
        for kind, name in (("answer_type", annotation.answer_type), ("question_type", annotation.question_type)):
            if name:
                by_name[f"{kind}/{name}"].append(score)
    return {**{name: fmean(by_name[name]) for name in sorted(by_name)}, "num_questions": float(len(annotations))}


def score_answer(prediction: str, answers: Iterable[str]) -> float:
    """The official accuracy in [0, 1] of one answer to a question that people answered so."""
    people = [clean_answer(answer) for answer in answers]
    answer = clean_answer(prediction)
    if len(set(people)) > 1:
        people = [normalise_answer(given) for given in people]
        answer = normalise_answer(answer)
    return leave_one_out_accuracy(people.count(answer), len(people))


def check_predictions(predictions: Mapping[int, str], question_ids: Iterable[int]) -> None:
    """Raises DataError unless there is one answer to each question and no other."""
    known = set(question_ids)
    if not known:
        raise DataError("vqa: expected questions with annotations, found none")
    if unknown := sorted(predictions.keys() - known):
        raise DataError(f"vqa results: {len(unknown)} answers to unknown questions, first question_id {unknown[0]}")
    if missing := sorted(known - predictions.keys()):
        raise DataError(f"vqa results: no answer to {len(missing)} of {len(known)} questions, first question_id {missing[0]}")


def gather_predictions(own: Mapping[int, str]) -> dict[int, str]:
    """All ranks' answers, by question id, on every rank. Raises DataError for a question answered on two ranks."""
    merged: dict[int, str] = {}
    for share in gather_objects(dict(own)):
        if twice := merged.keys() & share.keys():
            raise DataError(f"vqa: question_id {min(twice)} was answered on two ranks; each belongs to one")
        merged |= share
    return merged


def write_results(path: Path, predictions: Mapping[int, str]) -> None:
    """The official results format, sorted by id: `[{"question_id": 1, "answer": "yes"}, ...]`."""
    rows = [{"question_id": question_id, "answer": predictions[question_id]} for question_id in sorted(predictions)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def read_results(path: Path) -> dict[int, str]:
    """Answers by question id from the official results format. Raises DataError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such results file") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects with question_id and answer, found {type(rows).__name__}")
    predictions: dict[int, str] = {}
    for number, row in enumerate(rows):
        question_id = row.get("question_id") if isinstance(row, dict) else None
        if type(question_id) is not int or not isinstance(row.get("answer"), str):
            raise DataError(f"{path}: [{number}]: expected a whole question_id and a text answer, found {str(row)[:120]}")
        if question_id in predictions:
            raise DataError(f"{path}: question_id {question_id} is answered twice")
        predictions[question_id] = row["answer"]
    return predictions
