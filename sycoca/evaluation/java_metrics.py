"""METEOR and SPICE, which exist in Java only: by the programs that pycocoevalcap brings. What cannot run is named as absent."""

import importlib
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sycoca.evaluation.caption_metrics import PERCENT, CaptionScores, mean_scores, merge_scores, tokenize_captions

METEOR_JAR = Path("meteor") / "meteor-1.5.jar"
SPICE_JAR = Path("spice") / "spice-1.0.jar"
SPICE_MODELS = tuple(Path("spice") / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models"))

Tokenized = Mapping[str, str]
TokenizedReferences = Mapping[str, Sequence[str]]


class _CannotRunError(Exception):
    """Why a metric is absent."""


def score_with_java(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
    """METEOR 1.5 and SPICE of raw captions, times 100; `absent` says of each that is not there why: no Java, no
    pycocoevalcap, a file missing, a program that failed. Nothing is downloaded. Raises DataError as score_captions does.

    METEOR of the corpus is METEOR's own aggregate, not the mean over images.
    """
    tokenized = tokenize_captions(predictions, references)
    return merge_scores(_attempt("METEOR", _meteor, *tokenized), _attempt("SPICE", _spice, *tokenized))


def _attempt(
    name: str, measure: Callable[[Tokenized, TokenizedReferences], CaptionScores], predictions: Tokenized,
    references: TokenizedReferences,
) -> CaptionScores:  # fmt: skip
    try:
        return measure(predictions, references)
    except _CannotRunError as reason:
        return CaptionScores({}, {}, {name: str(reason)})


def _meteor(predictions: Tokenized, references: TokenizedReferences) -> CaptionScores:
    """The program's `-stdio` protocol: first the statistics of each caption, then the scores of all statistics together."""
    command = [_find_java(), "-jar", "-Xmx2G", str(_find(METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    keys = sorted(predictions)
    captions = [" ||| ".join(["SCORE", *references[key], predictions[key]]) for key in keys]
    statistics = _answer(command, captions)
    scores = [float(line) for line in _answer(command, [" ||| ".join(["EVAL", *statistics])])]
    if len(scores) != len(keys) + 1:
        raise _CannotRunError(f"the program gave {len(scores)} scores for {len(keys)} captions")
    per_image = {key: {"METEOR": PERCENT * score} for key, score in zip(keys, scores)}
    return CaptionScores({"METEOR": PERCENT * scores[-1]}, per_image)


def _spice(predictions: Tokenized, references: TokenizedReferences) -> CaptionScores:
    """By pycocoevalcap's class, which writes its cache beside its own files."""
    _find_java()
    for path in (SPICE_JAR, *SPICE_MODELS):
        _find(path, remedy="; pycocoevalcap.spice.get_stanford_models.get_stanford_models() downloads the models (400 MB)")
    spice = importlib.import_module("pycocoevalcap.spice.spice").Spice()
    keys = sorted(predictions)
    try:
        _, scores = spice.compute_score({key: list(references[key]) for key in keys}, {key: [predictions[key]] for key in keys})
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise _CannotRunError(f"the program failed: {error}") from error
    per_image = {key: {"SPICE": PERCENT * score["All"]["f"]} for key, score in zip(keys, scores, strict=True)}
    return CaptionScores(mean_scores(per_image), per_image)


def _answer(command: Sequence[str], lines: Sequence[str]) -> list[str]:
    """The lines that the program writes for these."""
    text = "\n".join(lines) + "\n"
    try:
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise _CannotRunError(f"the program failed: {said[-1] if said else error}") from error
    return done.stdout.splitlines()


def _find_java() -> str:
    java = shutil.which("java")
    if java is None:
        raise _CannotRunError("no java on PATH")
    return java


def _find(path: Path, *, remedy: str = "") -> Path:
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None:
        raise _CannotRunError("pycocoevalcap is not installed; pip install pycocoevalcap")
    for folder in package.submodule_search_locations or ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise _CannotRunError(f"pycocoevalcap has no {path}{remedy}")
