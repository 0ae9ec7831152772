"""A lightweight captioner, a checkpoint of ours or captions in a file, measured in one way and beside each other."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.captioners.captioner import Written, is_captioner, read_fit
from sycoca.captioners.captioner_loading import load_captioner, load_light
from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.captioners.linear_aligner import load_aligner
from sycoca.captioners.score import AlignedScorer, ClipScorer, RefAlignedScorer, RefClipScorer, Scorer
from sycoca.data.transforms import TransformConfig
from sycoca.distributed import gather_objects, rank
from sycoca.evaluation.caption_files import read_predictions, write_predictions
from sycoca.evaluation.caption_report import CaptionFiles, ShardReading, report_scores
from sycoca.evaluation.captioning import caption_batches
from sycoca.evaluation.image_sources import read_image
from sycoca.evaluation.rating import RatingEvaluator
from sycoca.pretrained import load
from sycoca.types import ConfigError, DataError

IMAGE_BATCH = 32
Caption = Callable[[Tensor, list[str]], list[str]]


class Subject(NamedTuple):
    """What writes captions."""

    caption: Caption
    transform: TransformConfig
    """Of its images."""
    encoder: FrozenEncoder | None
    """None where it has none that could rate captions."""
    facts: Mapping[str, Any]
    """What is known of how it was made."""


class Judge(NamedTuple):
    """What rates captions: an encoder with CLIP-S, and with an aligner aCLIP-S too; None is not given."""

    encoder: str | None
    """The subject's own where it is not given."""
    aligner: Path | None


def open_subject(path: Path, device: torch.device | str, judge: FrozenEncoder | None) -> Subject:
    """A captioner's folder, a checkpoint or run folder, or a JSON file of captions (which is rated by `judge` alone).

    Raises DataError, CheckpointError, ConfigError where it is none of these.
    """
    if is_captioner(path):
        light = load_light(path, device)
        facts = {"captioner": light.kind, **read_fit(path)}
        return Subject(light.caption, light.encoder.transform_config, light.encoder, facts)
    if path.is_file():
        if judge is None:
            raise ConfigError(f"{path}: captions in a file have no encoder to rate them; name one with --encoder")
        return Subject(_look_up(path), judge.transform_config, None, {})
    loaded = load(path, device=device)
    return Subject(loaded.caption, loaded.config.transform, None, {"captioner": "checkpoint"})


def report_subject(
    path: Path, device: torch.device | str, *, reading: ShardReading, judge: Judge, files: CaptionFiles
) -> dict[str, Any]:
    """Every score by name times 100, `captions_per_second` of all ranks together, what fitting took where that is known.

    All ranks must call this, and the first has the scores. Raises ConfigError, DataError, CheckpointError.
    """
    if not reading.shards:
        raise ConfigError("expected --shards: images with their captions")
    named = load_encoder(judge.encoder, device) if judge.encoder is not None else None
    subject = open_subject(path, device, named)
    encoder = named or subject.encoder or load_encoder(str(path), device)
    scorers = build_scorers(encoder, judge.aligner)
    timed = _Timed(subject.caption)
    captions = caption_batches(reading.open_batches(subject.transform), timed)
    rated = RatingEvaluator(reading.open_batches(encoder.transform_config), scorers)(encoder, captions.predictions)
    speed = sum(num / seconds for num, seconds in gather_objects((timed.num, timed.seconds)) if seconds)
    if rank() > 0:
        return {}
    if files.out is not None:
        write_predictions(files.out, captions.predictions)
    scores = report_scores(captions, others=[rated], per_image=files.per_image)
    return {**scores, "captions_per_second": speed, "rated_by": encoder.name, **subject.facts}


def caption_images(
    folder: Path, paths: Sequence[Path], device: torch.device | str, *, is_explained: bool
) -> dict[str, Any]:
    """`captions` by image file; explained, each with what was retrieved and how the candidates were rated."""
    captioner = load_captioner(folder, device)
    written: list[Written] = []
    for start in range(0, len(paths), IMAGE_BATCH):
        written += captioner.explain([read_image(path) for path in paths[start : start + IMAGE_BATCH]])
    rows = zip(map(str, paths), written, strict=True)
    return {"captions": {path: asdict(row) if is_explained else row.caption for path, row in rows}}


def build_scorers(encoder: FrozenEncoder, aligner: Path | None) -> list[Scorer]:
    """CLIP-S and RefCLIP-S; with the file of an aligner also aCLIP-S and RefaCLIP-S. Raises DataError for another encoder's."""
    scorers: list[Scorer] = [ClipScorer(encoder), RefClipScorer(encoder)]
    if aligner is not None:
        fitted = load_aligner(aligner)
        scorers += [AlignedScorer(encoder, fitted), RefAlignedScorer(encoder, fitted)]
    return scorers


class _Timed:
    """A captioner that looks at the clock."""

    def __init__(self, caption: Caption):
        self._caption, self.num, self.seconds = caption, 0, 0.0

    def __call__(self, image_BCHW: Tensor, keys: list[str]) -> list[str]:
        start = time.perf_counter()
        written = self._caption(image_BCHW, keys)
        self.seconds += time.perf_counter() - start
        self.num += len(keys)
        return written


def _look_up(path: Path) -> Caption:
    predictions = read_predictions(path)

    def caption(image_BCHW: Tensor, keys: list[str]) -> list[str]:
        lost = [key for key in keys if key not in predictions]
        if lost:
            raise DataError(f"{path}: no caption of {lost[0]}; expected one for each image of the shards")
        return [predictions[key] for key in keys]

    return caption
