"""Predictions and references in the files that other tools write, and the report made of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from sycoca.evaluation import caption_report
from sycoca.evaluation.caption_files import read_captions, read_predictions, write_predictions
from sycoca.evaluation.caption_metrics import CaptionScores, score_captions
from sycoca.evaluation.caption_report import CaptionFiles, report_files
from sycoca.types import ConfigError, DataError

TEXTS = {7: ["a dog runs", "the dog"], 12: ["a cat sits", "one cat"], 30: ["a bus", "a red bus stops"]}
FILES = {7: "a.b.jpg", 12: "cat 2.jpg", 30: "bus.jpg"}
COCO = {
    "images": [{"id": number, "file_name": name} for number, name in FILES.items()],
    "annotations": [{"image_id": number, "caption": text} for number in (30, 7, 12) for text in TEXTS[number]],
}
KARPATHY = {
    "images": [
        {
            "filename": FILES[number],
            "split": split,
            "cocoid": number,
            "imgid": place,
            "sentences": [{"raw": text} for text in TEXTS[number]],
        }
        for place, (number, split) in enumerate({7: "test", 12: "test", 30: "restval"}.items())
    ]
}


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([{"image_id": 7, "caption": "x"}, {"image_id": 12, "caption": "y"}], COCO),
        ({"7": "x", "12": "y"}, COCO),
        ({"a.b.jpg": "x", "cat 2.jpg": "y"}, COCO),
        ({"a_b": "x", "cat_2": "y"}, COCO),
        ({"7": "x", "12": "y"}, KARPATHY),
        ({"a.b.jpg": "x", "cat 2.jpg": "y"}, KARPATHY),
        ({"a_b": "x", "cat_2": "y"}, KARPATHY),
        ({"0": "x", "1": "y"}, KARPATHY),
        ({"7": "x", "12": "y"}, {str(number): texts for number, texts in TEXTS.items()}),
    ],
)
def test_predictions_find_their_references_by_any_name_the_file_has(tmp_path: Path, predictions: Any, references: Any):
    found = read_captions(write(tmp_path / "p.json", predictions), write(tmp_path / "r.json", references), split="test")
    assert list(found.predictions.values()) == ["x", "y"]
    assert [found.references[key] for key in found.predictions] == [TEXTS[7], TEXTS[12]]


def test_restval_counts_as_train(tmp_path: Path):
    found = read_captions(write(tmp_path / "p.json", {"30": "x"}), write(tmp_path / "r.json", KARPATHY), split="train")
    assert found.references == {"30": TEXTS[30]}


def test_images_left_out_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sycoca.log.logger.propagate", True)
    read_captions(write(tmp_path / "p.json", {"30": "x"}), write(tmp_path / "r.json", COCO), split="test")
    assert "2 of 3 images have no prediction" in caplog.text


def test_written_predictions_are_read_again(tmp_path: Path):
    write_predictions(tmp_path / "p.json", {"b": "ein Café", "a": ""})
    assert read_predictions(tmp_path / "p.json") == {"b": "ein Café", "a": ""}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, COCO, "no predictions"),
        ([], COCO, "expected a list of"),
        ({"7": ["x"]}, COCO, "expected a list of"),
        ([{"image_id": 7, "caption": None}], COCO, "not text"),
        ([{"image_id": 7, "caption": "x"}] * 2, COCO, "2 captions of 1 images"),
        ({"8": "x", "7": "y"}, COCO, "1 of 2 predictions have no references.*'8'.*'30' or 'a.b.jpg'"),
        ({"30": "x"}, KARPATHY, "1 of 1 predictions"),
        ({"7": "x"}, [1], "expected COCO captions"),
        ({"7": "x"}, {"7": "not a list"}, "expected COCO captions"),
        ({"7": "x"}, {"annotations": [{"image_id": 7, "caption": 3}]}, "not text"),
        ({"7": "x"}, {"images": [{**KARPATHY["images"][0], "sentences": [{"tokens": []}]}]}, "without `raw`"),
        ({"7": "x"}, {"images": [{**KARPATHY["images"][0], "split": "val"}]}, "no image in split 'test'; splits there: val"),
        ({"7": "x"}, {"images": [KARPATHY["images"][0]] * 2}, "2 images with 1 file names"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, predictions: Any, references: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_captions(write(tmp_path / "p.json", predictions), write(tmp_path / "r.json", references), split="test")


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ('{"a": "x", "a": "y"}', "'a' is there twice")])
def test_broken_json_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "p.json")


def test_the_report_has_every_score_and_names_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caption_report, "score_with_java", lambda *_: CaptionScores({}, {}, {"METEOR": "no java on PATH"}))
    predictions = write(tmp_path / "p.json", {"7": "a dog sits", "12": "a cat"})
    files = CaptionFiles(predictions, write(tmp_path / "r.json", COCO), "test", None, tmp_path / "each.json")
    report = report_files(files)
    scores = score_captions({"7": "a dog sits", "12": "a cat"}, {"7": TEXTS[7], "12": TEXTS[12]})
    assert report == {**scores.corpus, "num_images": 2, "absent": {"METEOR": "no java on PATH"}}
    each = json.loads((tmp_path / "each.json").read_text())
    assert each["7"] == {"caption": "a dog sits", "references": TEXTS[7], **scores.per_image["7"]}


def test_references_must_come_with_predictions(tmp_path: Path):
    with pytest.raises(ConfigError, match="--predictions and --references"):
        report_files(CaptionFiles(tmp_path / "p.json", None, "test", None, None))
