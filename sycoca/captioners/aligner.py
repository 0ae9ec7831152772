"""A linear map from one embedding space to another in closed form: OLS, ridge, Procrustes, robust Procrustes.

Sums are streamed in float64 and can be merged, so a million pairs need a pass and a few megabytes. Sources: SITTA
(arXiv 2307.05591v1) for the expanded regression, ReCap (v2 of the same) for image to text, Groenen et al. 2005 for the
re-weighting.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sycoca.types import ConfigError, DataError

Method = Literal["ols", "ridge", "procrustes", "robust"]
ROBUST_ROUNDS = 5
"""Re-weightings by inverse residual (SITTA)."""
RANK_TOLERANCE = 1e-12
"""Eigenvalues of the second moment below this share of the largest are zero to float64 sums: OLS then has least norm."""
RESIDUAL_FLOOR = 1e-6
"""Of a target's norm: a residual below it weighs no more, or one exact pair would outweigh all others."""


class PairBlock(NamedTuple):
    """Rows to be mapped and where they should go."""

    source_NE: Tensor
    target_NF: Tensor
    """With counts: the sum of a row's targets."""
    count_N: Tensor | None = None
    """How many targets each source row has, or its weight (then the target is scaled by it too); None is one."""


ReadPairs = Callable[[], Iterable[PairBlock]]
"""Gives the training pairs in blocks, the same ones each time it is called."""


class AlignerFit:
    """Streaming sums of pairs, float64: their number, sums, second moment of the sources and cross moment."""

    def __init__(self, source_width: int, target_width: int):
        self.num_pairs = 0.0
        self.source_sum_E = torch.zeros(source_width, dtype=torch.float64)
        self.target_sum_F = torch.zeros(target_width, dtype=torch.float64)
        self.source_moment_EE = torch.zeros(source_width, source_width, dtype=torch.float64)
        self.cross_moment_EF = torch.zeros(source_width, target_width, dtype=torch.float64)

    @torch.no_grad()
    def update(self, source_NE: Tensor, target_NF: Tensor, count_N: Tensor | None = None) -> None:
        """Add pairs; with counts, row i stands for `count_N[i]` pairs whose targets sum to `target_NF[i]`.

        The solution is then (sum c x x^T)^-1 (sum x s^T): SITTA's expanded regression, not expanded. Raises DataError for
        other shapes than the fit's, negative counts, numbers that are not finite.
        """
        source_NE, target_NF = source_NE.detach().cpu().double(), target_NF.detach().cpu().double()
        count_N = torch.ones(len(source_NE)) if count_N is None else count_N.detach().cpu()
        count_N = count_N.double()
        self._check(source_NE, target_NF, count_N)
        weighted_NE = source_NE * count_N[:, None]
        self.num_pairs += count_N.sum().item()
        self.source_sum_E += weighted_NE.sum(0)
        self.target_sum_F += target_NF.sum(0)
        self.source_moment_EE += source_NE.T @ weighted_NE
        self.cross_moment_EF += source_NE.T @ target_NF

    @torch.no_grad()
    def merge(self, other: "AlignerFit") -> None:
        """Add the other's pairs; the order of merging shows in rounding only."""
        if other.cross_moment_EF.shape != self.cross_moment_EF.shape:
            raise DataError(f"cannot merge fits of {_sizes(self)} and {_sizes(other)}: they are of other spaces")
        self.num_pairs += other.num_pairs
        for name in ("source_sum_E", "target_sum_F", "source_moment_EE", "cross_moment_EF"):
            getattr(self, name).add_(getattr(other, name))

    @torch.no_grad()
    def solve(self, method: Method, *, ridge: float = 1.0, is_centred: bool = False) -> Tensor:
        """EF float64: W of least sum |x W - y|^2, under `method`'s condition.

        ols: none; where sources span fewer dimensions than they have, the W of least norm. ridge: + ridge * |W|^2, as
        scikit-learn's. procrustes: W with orthonormal columns (or rows, if F > E). `is_centred`: as if both means had
        been taken off before. Raises ConfigError for `robust`, which needs the rows (`fit_map`), DataError without pairs.
        """
        if self.num_pairs <= 0:
            raise DataError("a linear map needs pairs to be fitted on, found none")
        moment_EE, cross_EF = self.source_moment_EE, self.cross_moment_EF
        if is_centred:
            mean_E = self.source_sum_E / self.num_pairs
            moment_EE = moment_EE - torch.outer(mean_E, self.source_sum_E)
            cross_EF = cross_EF - torch.outer(mean_E, self.target_sum_F)
        if method == "procrustes":
            left_ER, _, right_RF = torch.linalg.svd(cross_EF, full_matrices=False)
            return left_ER @ right_RF
        if method == "ols":
            return torch.linalg.pinv(moment_EE, hermitian=True, rtol=RANK_TOLERANCE) @ cross_EF
        if method == "ridge":
            if ridge <= 0:
                raise ConfigError(f"ridge: expected a penalty above 0, found {ridge}; without one use ols")
            return torch.linalg.solve(moment_EE + ridge * torch.eye(len(moment_EE), dtype=torch.float64), cross_EF)
        raise ConfigError(f"method {method!r}: expected ols, ridge or procrustes here; robust needs the rows (fit_map)")

    def _check(self, source_NE: Tensor, target_NF: Tensor, count_N: Tensor) -> None:
        found = (source_NE.shape[-1], target_NF.shape[-1])
        if found != tuple(self.cross_moment_EF.shape) or not len(source_NE) == len(target_NF) == len(count_N):
            raise DataError(
                f"expected as many rows of {_sizes(self)} and counts, found {tuple(source_NE.shape)}, "
                f"{tuple(target_NF.shape)} and {len(count_N)}"
            )
        if not (source_NE.isfinite().all() and target_NF.isfinite().all() and count_N.isfinite().all()):
            raise DataError("a linear map is fitted on finite pairs, found NaN or infinity; look at the embeddings")
        if (count_N < 0).any():
            raise DataError("a linear map takes counts of 0 or more, found a negative one")


def fit_map(read_pairs: ReadPairs, method: Method, *, ridge: float = 1.0, num_rounds: int = ROBUST_ROUNDS) -> Tensor:
    """EF float64: the map of all pairs, by any method. `robust` reads them once more for each re-weighting.

    robust: Procrustes, then `num_rounds` times Procrustes with each row's weight divided by its residual |x W - y|. It weighs
    rows: a row that sums several targets counts as one with their mean.
    """
    if method not in get_args(Method):
        raise ConfigError(f"method {method!r}: expected one of {', '.join(get_args(Method))}")
    if method != "robust":
        return _sum_pairs(read_pairs()).solve(method, ridge=ridge)
    weight_EF = _sum_pairs(read_pairs()).solve("procrustes")
    for _ in range(num_rounds):
        weight_EF = _sum_pairs(_reweigh(block, weight_EF) for block in read_pairs()).solve("procrustes")
    return weight_EF


def _sum_pairs(blocks: Iterable[PairBlock]) -> AlignerFit:
    fit = None
    for block in blocks:
        fit = fit or AlignerFit(block.source_NE.shape[-1], block.target_NF.shape[-1])
        fit.update(*block)
    if fit is None:
        raise DataError("a linear map needs pairs to be fitted on, found none")
    return fit


@torch.no_grad()
def _reweigh(block: PairBlock, weight_EF: Tensor) -> PairBlock:
    """The same pairs, each weighing its count over its residual."""
    source_NE, target_NF = block.source_NE.cpu().double(), block.target_NF.cpu().double()
    count_N = torch.ones(len(source_NE)).double() if block.count_N is None else block.count_N.cpu().double()
    mean_NF = target_NF / count_N.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    floor_N = (RESIDUAL_FLOOR * mean_NF.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
    weight_N = count_N / (source_NE @ weight_EF - mean_NF).norm(dim=1).maximum(floor_N)
    return PairBlock(source_NE, mean_NF * weight_N[:, None], weight_N)


def _sizes(fit: AlignerFit) -> str:
    return " to ".join(map(str, fit.cross_moment_EF.shape)) + " numbers"
