"""A linear probe: logistic regression on the features of a frozen image encoder (CLIP, arXiv 2103.00020, appendix A.3)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sycoca.config import Config
from sycoca.data.classes import ClassRecords, load_class_records
from sycoca.data.indexed import IndexedConfig, build_indexed_eval_loader
from sycoca.distributed import gather_objects, gather_uneven_rows, rank, world_size
from sycoca.evaluation.zero_shot import ClassCounts, accuracy_metrics
from sycoca.finetune.classification import ClassImagesConfig
from sycoca.finetune.classification_model import ImagePool, classification_parts, count_hits, pool_image, pooled_width
from sycoca.finetune.start import Start, StartConfig, start_from
from sycoca.log import logger
from sycoca.types import DataError

FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0)
"""Strengths of the penalty that are tried first, as powers of ten."""
NUM_HALVINGS = 3
"""Times that the sweep looks between its best strength and the neighbours, at half the distance."""
ROWS_A_CHUNK = 1 << 16
"""Rows of which logits are alive at a time."""
GRADIENT_TOLERANCE = 1e-7
HISTORY = 20  # steps that LBFGS learns the curvature from


class LinearProbeConfig(Config):
    """One experiment."""

    start: StartConfig
    train: ClassImagesConfig
    val: ClassImagesConfig
    pool: ImagePool = "mean"
    batch_size: int = Field(default=128, ge=1)
    num_workers: int = Field(default=2, ge=0)
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the training images, by which the strength of the penalty is chosen."""
    max_iterations: int = Field(default=1000, ge=1)
    precision: Literal["float32", "float64"] = "float64"
    seed: int = 0


class LabelledRows(NamedTuple):
    """Features with their classes, in the order of the images' keys: the same at any number of processes."""

    feature_SD: Tensor
    label_S: Tensor


@dataclass(frozen=True)
class LogisticFit:
    """A fitted multinomial logistic regression of N classes."""

    weight_ND: Tensor
    bias_N: Tensor
    gradient: float
    """The largest partial derivative in absolute value: how near the optimum is."""

    def logits(self, feature_SD: Tensor) -> Tensor:
        """SN."""
        return F.linear(feature_SD, self.weight_ND, self.bias_N)


def linear_probe(config: LinearProbeConfig, device: torch.device) -> dict[str, float]:
    """Encode once, choose the penalty on a held-out share of the training images, fit on all of them, measure on the others.

    All ranks encode; each then fits the same rows. Gives `top_1`, `top_5`, `mean_per_class` in percent, `num_images`, the
    `strength` chosen, its `held_out_top_1` and the fit's `gradient`.
    """
    start = start_from(config.start, parts=classification_parts(config.pool))
    start.model.eval().requires_grad_(False).to(device)
    train_records = load_class_records(config.train.images, split=config.train.split)
    names = train_records.class_names
    val_records = load_class_records(config.val.images, split=config.val.split, class_names=names)
    train, val = (encode_rows(start, records, config) for records in (train_records, val_records))
    mean_D, scale_D = train.feature_SD.mean(0), train.feature_SD.std(0)
    for rows in (train, val):
        rows.feature_SD.sub_(mean_D).div_(torch.where(scale_D > 0, scale_D, 1.0))  # in place: they are the bulk of the memory
    strength, held_out_top_1 = choose_strength(train, len(names), config)
    fit = fit_logistic(train, len(names), strength=strength, max_iterations=config.max_iterations)
    logger.info("fitted %d rows, largest derivative %.1e", len(train.label_S), fit.gradient)
    return {
        **measure_rows(fit, val), "strength": strength, "held_out_top_1": held_out_top_1, "gradient": fit.gradient,
    }  # fmt: skip


@torch.no_grad()
def encode_rows(start: Start, records: ClassRecords, config: LinearProbeConfig) -> LabelledRows:
    """Features of every image, on every rank. Raises DataError where none can be read."""
    data = IndexedConfig(batch_size=config.batch_size, num_workers=config.num_workers, transform=start.config.transform)
    loader = build_indexed_eval_loader(
        records, data, tokenizer=start.tokenizer, rank=rank(), world_size=world_size(), batch_size=config.batch_size
    )
    device = next(start.model.parameters()).device
    width = pooled_width(start.model, config.pool)
    features, labels = [torch.zeros(0, width, device=device)], [torch.zeros(0, 1, dtype=torch.int64, device=device)]
    keys: list[str] = []
    for batch in loader:
        features.append(pool_image(start.model, batch["image"].to(device), config.pool).float())
        labels.append(batch["target"][:, None].to(device))
        keys += batch["key"]
    all_keys = [key for some in gather_objects(keys) for key in some]
    if not all_keys:
        raise DataError("linear probe: no image could be read")
    order_S = torch.tensor(sorted(range(len(all_keys)), key=all_keys.__getitem__), device=device)
    feature_SD, label_S1 = gather_uneven_rows(torch.cat(features)), gather_uneven_rows(torch.cat(labels))
    return LabelledRows(feature_SD[order_S].to(getattr(torch, config.precision)), label_S1[order_S, 0])


def choose_strength(rows: LabelledRows, num_classes: int, config: LinearProbeConfig) -> tuple[float, float]:
    """The strength that does best on the held-out share, and its top-1 there in percent; of equals the strongest.

    Two decades apart at first, then around the best at half the distance, as CLIP's search does.
    """
    order_S = torch.randperm(len(rows.label_S), generator=torch.Generator().manual_seed(config.seed))
    num_held_out = max(1, round(config.held_out_share * len(order_S)))
    kept, held_out = (
        LabelledRows(*(part[place_S.to(part.device)] for part in rows))
        for place_S in (order_S[num_held_out:], order_S[:num_held_out])
    )
    if len(kept.label_S) == 0:
        raise DataError(f"linear probe: {len(order_S)} training images are too few to hold {num_held_out} out")
    found: dict[float, float] = {}

    def best() -> float:
        return max(found, key=lambda exponent: (found[exponent], exponent))

    def try_out(exponents: tuple[float, ...]) -> None:
        for exponent in exponents:
            if exponent not in found:
                fit = fit_logistic(kept, num_classes, strength=10.0**exponent, max_iterations=config.max_iterations)
                found[exponent] = measure_rows(fit, held_out)["top_1"]
                logger.info("strength 10^%g: held-out top-1 %.2f", exponent, found[exponent])

    try_out(FIRST_EXPONENTS)
    distance = FIRST_EXPONENTS[1] - FIRST_EXPONENTS[0]
    for _ in range(NUM_HALVINGS):
        distance /= 2
        try_out((best() - distance, best() + distance))
    return 10.0 ** best(), found[best()]


def fit_logistic(rows: LabelledRows, num_classes: int, *, strength: float, max_iterations: int) -> LogisticFit:
    """Minimises mean cross-entropy + strength / 2 * |W|^2 by LBFGS on all rows at once; the bias is not penalised.

    With S rows this is scikit-learn's LogisticRegression(C=1 / (strength * S)).
    """
    feature_SD, label_S = rows
    weight_ND = feature_SD.new_zeros((num_classes, feature_SD.shape[1])).requires_grad_()
    bias_N = feature_SD.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_ND, bias_N], max_iter=max_iterations, history_size=HISTORY, line_search_fn="strong_wolfe",
        tolerance_grad=GRADIENT_TOLERANCE, tolerance_change=0.0,
    )  # fmt: skip

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        total = strength / 2 * weight_ND.square().sum()
        total.backward()
        for start in range(0, len(label_S), ROWS_A_CHUNK):
            part = slice(start, start + ROWS_A_CHUNK)
            logit_SN = F.linear(feature_SD[part], weight_ND, bias_N)
            loss = F.cross_entropy(logit_SN, label_S[part], reduction="sum") / len(label_S)
            loss.backward()
            total = total.detach() + loss.detach()
        return total.detach()

    optimizer.step(closure)
    closure()
    assert weight_ND.grad is not None and bias_N.grad is not None, "the closure leaves gradients"
    gradient = max(weight_ND.grad.abs().max().item(), bias_N.grad.abs().max().item())
    return LogisticFit(weight_ND.detach(), bias_N.detach(), gradient)


def measure_rows(fit: LogisticFit, rows: LabelledRows) -> dict[str, float]:
    """`top_1`, `top_5`, `mean_per_class` in percent and `num_images`."""
    counts_3N = sum(
        count_hits(fit.logits(rows.feature_SD[start : start + ROWS_A_CHUNK]), rows.label_S[start : start + ROWS_A_CHUNK])
        for start in range(0, len(rows.label_S), ROWS_A_CHUNK)
    )
    assert isinstance(counts_3N, Tensor), "there are rows to measure"
    return accuracy_metrics(ClassCounts(*counts_3N))
