"""The seams of the package: what flows between its parts, and the errors a user can cause.

Dimension legend, one for the whole package. A tensor with a settled shape ends in these letters.

    B pairs on this rank      G pairs on all ranks    C H W image              P patches
    K kept patches            M memory tokens         L text tokens            V vocabulary
    D width                   E shared embedding      F another target width   Q learned queries
    S rows of a datastore     J candidates an image   N any number of rows     T tokens generated so far
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor

Metrics = dict[str, Tensor]
"""Detached 0-d tensors by name; the mean over ranks is the figure of the whole batch."""


NUMBER_MARK = "#"
"""In a key, what follows it numbers the captions of one image: `photo#0` and `photo#1` are pairs of the same image."""


def image_of(key: str) -> str:
    """The image of a sample, by its key: without what numbers the pairs of one."""
    return key.partition(NUMBER_MARK)[0]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the dotted path and what to do."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file and what to do."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or the keys and what to do."""


class TrainingError(ValueError):
    """A training that cannot go on; the message names the step and what to do."""


class Batch(TypedDict):
    """One step's input. A plain dict: DDP, DeepSpeed and accelerate all understand it."""

    image: Tensor
    """BCHW float32, normalised."""
    token: Tensor
    """BL int64: bos ... eos pad pad; L is the longest caption in the batch, rounded up."""
    length: Tensor
    """B int64, tokens before padding, bos and eos counted."""
    key: list[str]
    """The samples' keys, unique in the data set."""
    position: dict[str, Any]
    """Where the loader worker stood when it made this batch, and the samples it dropped (data/pipeline.py)."""


@dataclass(frozen=True, slots=True)
class Features:
    """What one encoding of a batch gives to every objective. `image_BE` and `text_BE` have unit norm."""

    patch_BPD: Tensor
    token_BLD: Tensor
    summary_BD: Tensor | None
    """The summary token's state, that reads the whole caption; None where no objective needs it."""
    image_BE: Tensor | None
    text_BE: Tensor | None
    relevance_BP: Tensor | None = None
    """How much the caption speaks of each patch; None where no objective masks by it."""


@runtime_checkable
class DualEncoder(Protocol):
    """A pair of encoders with one embedding space: a checkpoint of ours, an open_clip model, a transformers CLIP."""

    def encode_image(self, image_BCHW: Tensor, /) -> Tensor:
        """BE, raw (not normalised), float32."""
        ...

    def encode_text(self, texts: list[str], /) -> Tensor:
        """NE, raw (not normalised), float32."""
        ...


@runtime_checkable
class Captioner(Protocol):
    """Writes one caption an image."""

    def caption(self, image_BCHW: Tensor, keys: list[str], /) -> list[str]:
        """`keys` name the images, so that nobody retrieves an image's own caption."""
        ...


class Evaluator(Protocol):
    """Measures a subject (an encoder or a captioner); gives the same numbers on every rank."""

    def __call__(self, subject: Any) -> dict[str, float]: ...
