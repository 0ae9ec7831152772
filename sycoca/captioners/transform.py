"""Embedding transforms (l2, centre, zscore, whiten, in sequences), fitted on training data, kept with what was built from it.

Every paper normalises in its own way: SITTA z-scores, SmallCap l2, ReCap l2 then centre, CgT-GAN not at all.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca.types import ConfigError, DataError

Kind = Literal["none", "l2", "centre", "zscore", "whiten"]
LEAST_VARIANCE = 1e-10
"""Of whiten: a direction of less than this share of the largest variance is one in which rows do not differ."""
ReadRows = Callable[[], Iterable[Tensor]]
"""Gives blocks NE of the training rows, the same ones each time it is called."""


class Step(NamedTuple):
    """One transform. What was fitted is float64, and None where the kind has nothing of it."""

    kind: Kind
    shift_E: Tensor | None = None
    scale_E: Tensor | None = None
    turn_EE: Tensor | None = None

    def apply(self, rows_NE: Tensor) -> Tensor:
        """NE in the type of the rows."""
        if self.kind == "l2":
            return F.normalize(rows_NE, dim=-1)
        if self.shift_E is not None:
            rows_NE = rows_NE - self.shift_E.to(rows_NE)
        if self.scale_E is not None:
            rows_NE = rows_NE / self.scale_E.to(rows_NE)
        return rows_NE if self.turn_EE is None else rows_NE @ self.turn_EE.to(rows_NE)


class EmbeddingTransform:
    """Steps one after the other; without steps the rows as they are."""

    def __init__(self, steps: Sequence[Step] = ()):
        self.steps = tuple(step for step in steps if step.kind != "none")

    @property
    def kinds(self) -> list[Kind]:
        """The steps' names in order."""
        return [step.kind for step in self.steps]

    @property
    def fingerprint(self) -> str:
        """16 characters that tell one fitted transform from another."""
        digest = hashlib.sha256(repr(self.kinds).encode())
        for tensor in self.tensors("").values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, rows_NE: Tensor) -> Tensor:
        """NE in the type of the rows. Raises DataError for rows of another width than was fitted."""
        for step in self.steps:
            if step.shift_E is not None and step.shift_E.shape[-1] != rows_NE.shape[-1]:
                raise DataError(
                    f"an embedding transform was fitted on rows of {step.shift_E.shape[-1]} numbers and got "
                    f"{rows_NE.shape[-1]}; use the encoder it was fitted with"
                )
            rows_NE = step.apply(rows_NE)
        return rows_NE

    def then_l2(self) -> "EmbeddingTransform":
        """The same, with unit rows at the end: inner products are then cosines."""
        return self if self.kinds[-1:] == ["l2"] else EmbeddingTransform([*self.steps, Step("l2")])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What was fitted, by name, for a file; with `kinds` it makes the transform again (`from_tensors`)."""
        found = {}
        for number, step in enumerate(self.steps):
            parts = (("shift", step.shift_E), ("scale", step.scale_E), ("turn", step.turn_EE))
            found |= {f"{prefix}{number}.{name}": tensor for name, tensor in parts if tensor is not None}
        return found


def from_tensors(kinds: Sequence[str], tensors: Mapping[str, Tensor], prefix: str) -> EmbeddingTransform:
    """The transform that `kinds` and `tensors(prefix)` describe."""
    return EmbeddingTransform(
        [
            Step(kind, *(tensors.get(f"{prefix}{number}.{name}") for name in ("shift", "scale", "turn")))
            for number, kind in enumerate(parse_kinds(kinds))
        ]
    )


def parse_kinds(names: Sequence[str]) -> list[Kind]:
    """The names, checked. Raises ConfigError for one that is not known."""
    for name in names:
        if name not in get_args(Kind):
            raise ConfigError(f"embedding transform {name!r}: expected a sequence of {', '.join(get_args(Kind))}")
    return cast(list[Kind], list(names))


@torch.no_grad()
def fit_transform(kinds: Sequence[str], read_rows: ReadRows) -> EmbeddingTransform:
    """Fit the steps in order, each on the rows as those before leave them: a pass over the rows for each with statistics.

    centre takes off the mean; zscore also divides by the standard deviation (over n; 1 where a number never changes);
    whiten takes off the mean and makes all directions in which the rows differ uncorrelated and of variance 1.
    Raises ConfigError for an unknown name, DataError for no rows or rows that are not finite.
    """
    transform = EmbeddingTransform()
    for kind in parse_kinds(kinds):
        step = Step(kind)
        if kind in ("centre", "zscore"):
            mean_E, std_E = _moments(transform(rows_NE.double()) for rows_NE in read_rows())
            step = Step(kind, mean_E, torch.where(std_E > 0, std_E, 1.0) if kind == "zscore" else None)
        elif kind == "whiten":
            mean_E, _ = _moments(transform(rows_NE.double()) for rows_NE in read_rows())
            step = Step(kind, mean_E, turn_EE=_whitening(transform(rows_NE.double()) - mean_E for rows_NE in read_rows()))
        transform = EmbeddingTransform([*transform.steps, step])
    return transform


def _whitening(blocks: Iterable[Tensor]) -> Tensor:
    """EE: the inverse square root of the covariance of centred rows, 0 where they do not differ."""
    num, product_EE = 0, torch.zeros(())
    for rows_NE in blocks:
        num, product_EE = num + len(rows_NE), product_EE.to(rows_NE) + rows_NE.T @ rows_NE
    value_E, vector_EE = torch.linalg.eigh(product_EE / num)
    is_kept_E = value_E > value_E[-1] * LEAST_VARIANCE
    return (vector_EE * torch.where(is_kept_E, value_E, torch.inf).rsqrt()) @ vector_EE.T


def _moments(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all rows, float64, blocks merged by Chan's rule: sums of squares would cancel."""
    num, mean_E, square_E = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for rows_NE in blocks:
        if not rows_NE.isfinite().all():
            raise DataError("an embedding transform is fitted on finite rows, found NaN or infinity; look at the embeddings")
        if len(rows_NE) == 0:
            continue
        block_mean_E = rows_NE.mean(0)
        delta_E, total = block_mean_E - mean_E.to(rows_NE), num + len(rows_NE)
        square_E = square_E.to(rows_NE) + (rows_NE - block_mean_E).square().sum(0)
        square_E += delta_E.square() * (num * len(rows_NE) / total)
        mean_E = mean_E.to(rows_NE) + delta_E * (len(rows_NE) / total)
        num = total
    if num == 0:
        raise DataError("an embedding transform needs training rows to be fitted on, found none")
    return mean_E, (square_E / num).sqrt()
