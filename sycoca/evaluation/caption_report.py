"""The captioning evaluation from end to end: captions from a model or a file, every metric that can be had, files written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sycoca.config import parse_config
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.tokenizer import Tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.distributed import rank, world_size
from sycoca.evaluation.caption_files import read_captions, write_per_image, write_predictions
from sycoca.evaluation.caption_metrics import CaptionScores, merge_scores, score_captions
from sycoca.evaluation.captioning import CaptionedSet, caption_batches
from sycoca.evaluation.clip_score import ClipScoreEvaluator
from sycoca.evaluation.java_metrics import score_with_java
from sycoca.types import ConfigError


class CaptionFiles(NamedTuple):
    """What is read and written; None is not given."""

    predictions: Path | None
    references: Path | None
    split: str
    """Of a Karpathy split file."""
    out: Path | None
    """Where a captioner's captions go."""
    per_image: Path | None


class _Description(Protocol):
    @property
    def transform(self) -> TransformConfig: ...


class Loaded(Protocol):
    """A model with what its batches need, as sycoca.load gives it."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> _Description: ...


class LoadedEncoder(Loaded, Protocol):
    """One that is a DualEncoder too."""

    def encode_image(self, image_BCHW: Tensor, /) -> Tensor: ...
    def encode_text(self, texts: list[str], /) -> Tensor: ...


class ShardReading(NamedTuple):
    """Which images of which shards are evaluated, and how many at a time."""

    shards: Sequence[str]
    batch_size: int
    num_workers: int
    limit: int | None
    """Batches a process at most; None is all."""

    def open_batches(self, transform: TransformConfig) -> Iterator[Mapping[str, Any]]:
        """This rank's share, transformed for a model; may be opened again for another. Raises ConfigError, DataError."""
        settings = {"shards": list(self.shards), "batch_size": self.batch_size, "num_workers": self.num_workers}
        config = parse_config(DataConfig, {**settings, "transform": transform}, source="options")
        loader = build_eval_loader(config, rank=rank(), world_size=world_size(), batch_size=self.batch_size)
        return islice(loader, self.limit)


def report_files(files: CaptionFiles) -> dict[str, Any]:
    """As report_scores, of captions made elsewhere. Raises ConfigError, DataError."""
    if files.predictions is None or files.references is None:
        raise ConfigError("expected a checkpoint with --shards, or --predictions and --references")
    if files.out is not None:
        raise ConfigError("--out is for the captions of a checkpoint; --predictions are in a file already")
    captions = read_captions(files.predictions, files.references, split=files.split)
    return report_scores(captions, per_image=files.per_image)


def report_captioner(
    subject: Loaded,
    caption: Callable[[Tensor, list[str]], list[str]],
    *,
    reading: ShardReading,
    encoder: LoadedEncoder | None,
    files: CaptionFiles,
) -> dict[str, Any]:
    """As report_scores, of what `caption` writes for the subject's batches; all ranks must call this, and the first has the
    scores. With an encoder also CLIP-S and RefCLIP-S. Raises ConfigError, DataError.
    """
    if files.predictions is not None or files.references is not None or not reading.shards:
        raise ConfigError("expected --shards with a checkpoint, and neither --predictions nor --references")
    captions = caption_batches(reading.open_batches(subject.config.transform), caption)
    others = []
    if encoder is not None:
        others = [ClipScoreEvaluator(reading.open_batches(encoder.config.transform))(encoder, captions.predictions)]
    if rank() > 0:
        return {}
    if files.out is not None:
        write_predictions(files.out, captions.predictions)
    return report_scores(captions, others=others, per_image=files.per_image)


def report_scores(captions: CaptionedSet, *, others: Sequence[CaptionScores] = (), per_image: Path | None) -> dict[str, Any]:
    """Scores by name, times 100, with `num_images` and, in `absent`, why METEOR or SPICE is not there.

    `others` are scores of the same captions measured before. Writes each image's scores to the file `per_image` if given.
    """
    scores = merge_scores(score_captions(*captions), *others, score_with_java(*captions))
    if per_image is not None:
        write_per_image(per_image, captions, scores)
    return {**scores.corpus, "num_images": len(captions.predictions), "absent": scores.absent}
