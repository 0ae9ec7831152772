"""Captions in files: predictions and references as other tools write them, matched by the names they give the images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sycoca.data.readers import KARPATHY_RESTVAL, build_key
from sycoca.evaluation.caption_metrics import CaptionScores
from sycoca.evaluation.captioning import CaptionedSet
from sycoca.log import logger
from sycoca.types import DataError

_PREDICTIONS = 'a list of {"image_id": ..., "caption": ...} (COCO results) or an object {id: caption}'
_REFERENCES = (
    'COCO captions ({"annotations": [{"image_id": ..., "caption": ...}]}), a Karpathy split file '
    '({"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}]}]}) or an object {id: [captions]}'
)
Naming = dict[str, list[str]]
"""References by one of the names that a file gives its images."""


def read_captions(predictions_path: Path, references_path: Path, *, split: str) -> CaptionedSet:
    """Predictions and their references; `split` is read for Karpathy's files only.

    COCO's images go by id, file name or our key (data/readers.py build_key), Karpathy's also by cocoid or imgid: whichever
    knows all the predictions. Images without a prediction are left out, which is logged. Raises DataError for a file of
    another kind, an image named twice, a prediction without references.
    """
    predictions = read_predictions(predictions_path)
    namings = _read_references(references_path, split)
    num_images = max(len(naming) for naming in namings)
    for naming in namings:
        if predictions.keys() <= naming.keys():
            if num_images > len(predictions):
                logger.warning("%d of %d images have no prediction and are left out", num_images - len(predictions), num_images)
            references = {key: naming[key] for key in predictions}
            if not all(isinstance(text, str) for texts in references.values() for text in texts):
                raise DataError(f"{references_path}: a caption that is not text; expected {_REFERENCES}")
            return CaptionedSet(predictions, references)
    best = max(namings, key=lambda naming: len(predictions.keys() & naming.keys()))
    lost = [key for key in predictions if key not in best]
    raise DataError(
        f"{predictions_path}: {len(lost)} of {len(predictions)} predictions have no references in {references_path}, "
        f"such as {lost[0]!r}; images there are named like {_examples(namings)}"
    )


def read_predictions(path: Path) -> dict[str, str]:
    """One caption an image, by its name as text. Raises DataError for a file of another kind, or an image named twice."""
    tree = _load(path)
    if isinstance(tree, dict) and all(isinstance(caption, str) for caption in tree.values()):
        predictions = dict(tree)
    elif isinstance(tree, list) and _have_all(tree, "image_id", "caption"):
        predictions = {str(row["image_id"]): row["caption"] for row in tree}
        if len(predictions) < len(tree):
            raise DataError(f"{path}: {len(tree)} captions of {len(predictions)} images; expected one for each")
    else:
        raise DataError(f"{path}: expected {_PREDICTIONS}")
    if not predictions:
        raise DataError(f"{path}: no predictions in it")
    if not all(isinstance(caption, str) for caption in predictions.values()):
        raise DataError(f"{path}: a caption that is not text; expected {_PREDICTIONS}")
    return predictions


def write_predictions(path: Path, predictions: Mapping[str, str]) -> None:
    """As a list of COCO results, which read_predictions and other tools read."""
    rows = [{"image_id": key, "caption": caption} for key, caption in predictions.items()]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")


def write_per_image(path: Path, captions: CaptionedSet, scores: CaptionScores) -> None:
    """For each image its caption, references and scores, as one JSON object."""
    tree = {
        key: {"caption": captions.predictions[key], "references": captions.references[key], **scores.per_image[key]}
        for key in captions.predictions
    }
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=1), encoding="utf-8")


def _read_references(path: Path, split: str) -> list[Naming]:
    tree = _load(path)
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected {_REFERENCES}")
    if _have_all(tree.get("annotations"), "image_id", "caption"):
        return _coco_namings(path, tree)
    if _have_all(tree.get("images"), "filename", "split", "sentences"):
        return _karpathy_namings(path, tree["images"], split)
    if tree and all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in tree.values()):
        return [dict(tree)]
    raise DataError(f"{path}: expected {_REFERENCES}")


def _coco_namings(path: Path, tree: Mapping[str, Any]) -> list[Naming]:
    by_id: Naming = {}
    for row in tree["annotations"]:
        by_id.setdefault(str(row["image_id"]), []).append(row["caption"])
    images = tree.get("images", [])
    rows = images if _have_all(images, "id", "file_name") else []
    named = [(row["file_name"], by_id[str(row["id"])]) for row in rows if str(row["id"]) in by_id]
    return [by_id, *_by_file(path, named)]


def _karpathy_namings(path: Path, rows: Sequence[Mapping[str, Any]], split: str) -> list[Naming]:
    splits = ["train" if row["split"] == KARPATHY_RESTVAL else row["split"] for row in rows]
    chosen = [row for row, its_split in zip(rows, splits, strict=True) if its_split == split]
    if not chosen:
        raise DataError(f"{path}: no image in split {split!r}; splits there: {', '.join(sorted(set(splits)))}")
    if not all(_have_all(row["sentences"], "raw") for row in chosen):
        raise DataError(f"{path}: a sentence without `raw`; expected {_REFERENCES}")
    texts = [[sentence["raw"] for sentence in row["sentences"]] for row in chosen]
    numbered = [
        {str(row[name]): captions for row, captions in zip(chosen, texts, strict=True)}
        for name in ("cocoid", "imgid")
        if all(name in row for row in chosen)
    ]
    named = [(row["filename"], captions) for row, captions in zip(chosen, texts, strict=True)]
    return [*_by_file(path, named), *numbered]


def _by_file(path: Path, named: Sequence[tuple[str, list[str]]]) -> list[Naming]:
    by_name = dict(named)
    by_key = {build_key(name): texts for name, texts in named}
    if len(by_name) < len(named):
        raise DataError(f"{path}: {len(named)} images with {len(by_name)} file names; expected one for each")
    return [by_name, by_key] if len(by_key) == len(named) > 0 else [by_name] if by_name else []


def _have_all(rows: Any, *names: str) -> bool:
    """Whether this is a list, not empty, of objects with these entries."""
    is_list = isinstance(rows, list) and len(rows) > 0
    return is_list and all(isinstance(row, dict) and row.keys() >= set(names) for row in rows)


def _examples(namings: Sequence[Naming]) -> str:
    return " or ".join(repr(next(iter(naming))) for naming in namings)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(path, pairs))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"{path}: {next(name for name in names if names.count(name) > 1)!r} is there twice; expected it once")
    return tree
