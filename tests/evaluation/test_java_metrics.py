"""METEOR and SPICE: named where they cannot run, official where they can."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from sycoca.evaluation import java_metrics
from sycoca.evaluation.java_metrics import METEOR_JAR, SPICE_JAR, SPICE_MODELS, score_with_java

OFFICIAL = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "caption_metrics"
PREDICTIONS, REFERENCES = {"b": "A dog.", "a": "The cat!"}, {"a": ["a cat", "cats"], "b": ["one dog"]}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pycocoevalcap whose jars are empty, and a java that is this Python."""
    folder = tmp_path / "pycocoevalcap"
    for path in (METEOR_JAR, SPICE_JAR, *SPICE_MODELS):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    (folder / "__init__.py").touch()  # an installed one of the same name is a namespace, which this shadows
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(java_metrics.shutil, "which", lambda _: sys.executable)
    yield folder
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]  # other tests of this process must not find it


def test_without_java_both_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(java_metrics.shutil, "which", lambda _: None)
    scores = score_with_java(PREDICTIONS, REFERENCES)
    assert scores.absent == {"METEOR": "no java on PATH", "SPICE": "no java on PATH"}
    assert scores.corpus == {}


def test_without_the_package_both_are_named(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(java_metrics.importlib.util, "find_spec", lambda _: None)
    assert set(score_with_java(PREDICTIONS, REFERENCES).absent) == {"METEOR", "SPICE"}


def test_a_missing_file_is_named_and_nothing_is_downloaded(package: Path):
    (package / METEOR_JAR).unlink()
    (package / SPICE_MODELS[1]).unlink()
    absent = score_with_java(PREDICTIONS, REFERENCES).absent
    assert "meteor-1.5.jar" in absent["METEOR"]
    assert "stanford-corenlp-3.6.0-models.jar" in absent["SPICE"] and "downloads" in absent["SPICE"]


def test_a_program_that_fails_is_named_with_what_it_said(package: Path):
    (package / SPICE_JAR).unlink()
    assert "failed: " in score_with_java(PREDICTIONS, REFERENCES).absent["METEOR"]  # this Python knows no -jar


def test_scores_go_to_their_images(package: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def answer(_command: list[str], *, input: str, **_options: object) -> subprocess.CompletedProcess[str]:
        asked.append(input.splitlines())
        return subprocess.CompletedProcess([], 0, "s1\ns2\n" if len(asked) == 1 else "0.25\n0.75\n0.4\n", "")

    monkeypatch.setattr(java_metrics.subprocess, "run", answer)
    (package / "spice" / "spice.py").write_text(
        "class Spice:\n"
        "    def compute_score(self, gts, res):\n"
        "        assert res == {'a': ['the cat'], 'b': ['a dog']} and gts['a'] == ['a cat', 'cats']\n"
        "        return 0.5, [{'All': {'f': 0.2}}, {'All': {'f': 0.6}}]\n"
    )
    scores = score_with_java(PREDICTIONS, REFERENCES)
    assert asked == [["SCORE ||| a cat ||| cats ||| the cat", "SCORE ||| one dog ||| a dog"], ["EVAL ||| s1 ||| s2"]]
    assert scores.corpus == pytest.approx({"METEOR": 40, "SPICE": 40})
    assert scores.per_image["a"] == pytest.approx({"METEOR": 25, "SPICE": 20})
    assert scores.per_image["b"] == pytest.approx({"METEOR": 75, "SPICE": 60})
    assert scores.absent == {}


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("java") is None or find_spec("pycocoevalcap") is None or not OFFICIAL.exists(),
    reason="no Java, no pycocoevalcap or no real data at SYCOCA_DATA",
)
def test_meteor_is_the_official_score():
    stored = json.loads((OFFICIAL / "f30k_test_linear_reg_1.0_flickr30k.json").read_text(encoding="utf-8"))
    scores = score_with_java(dict(zip(stored["ids"], stored["hyp"])), dict(zip(stored["ids"], stored["refs"])))
    assert scores.corpus["METEOR"] == pytest.approx(100 * stored["scores"]["METEOR"], abs=1e-10)
    found = [scores.per_image[key]["METEOR"] for key in stored["ids"]]
    assert found == pytest.approx([100 * score for score in stored["per_image"]["METEOR"]], abs=1e-10)
