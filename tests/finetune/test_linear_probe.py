"""The linear probe: its optimum against the equations and a plain solver, its search, and a probe from end to end."""

from pathlib import Path

import pytest
import torch
from labelled_data import COLOURS, loud_logger, save_start, write_images
from torch import Tensor
from torch.nn import functional as F

from sycoca.config import parse_config
from sycoca.data.classes import load_class_records
from sycoca.finetune.linear_probe import (
    FIRST_EXPONENTS,
    LabelledRows,
    LinearProbeConfig,
    choose_strength,
    encode_rows,
    fit_logistic,
    linear_probe,
    measure_rows,
)
from sycoca.finetune.start import StartConfig, start_from
from sycoca.types import DataError

__all__ = ["loud_logger"]
NUM_ROWS, WIDTH, NUM_CLASSES = 23, 4, 3
STRENGTH = 0.05


def build_rows(num_rows: int = NUM_ROWS, *, noise: float = 2.0, width: int = WIDTH) -> LabelledRows:
    """Classes that overlap, so that the optimum is a finite one even with next to no penalty."""
    generator = torch.Generator().manual_seed(2)
    label_S = torch.arange(num_rows) % NUM_CLASSES
    centre_ND = torch.randn(NUM_CLASSES, width, generator=generator, dtype=torch.float64)
    feature_SD = centre_ND[label_S] + noise * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    return LabelledRows(feature_SD, label_S)


def solve_by_newton(rows: LabelledRows, strength: float) -> Tensor:
    """(N, D + 1): weights and bias, by Newton's method on the whole Hessian."""

    def loss(flat: Tensor) -> Tensor:
        weight = flat.view(NUM_CLASSES, WIDTH + 1)
        logit_SN = rows.feature_SD @ weight[:, :WIDTH].T + weight[:, WIDTH]
        return F.cross_entropy(logit_SN, rows.label_S) + strength / 2 * weight[:, :WIDTH].square().sum()

    flat = torch.zeros(NUM_CLASSES * (WIDTH + 1), dtype=torch.float64)
    for _ in range(30):
        hessian = torch.autograd.functional.hessian(loss, flat)
        gradient = torch.autograd.functional.jacobian(loss, flat)
        assert isinstance(hessian, Tensor) and isinstance(gradient, Tensor)
        flat = flat - torch.linalg.pinv(hessian) @ gradient  # a constant added to every bias changes nothing: singular
    return flat.view(NUM_CLASSES, WIDTH + 1)


def test_the_fit_is_the_one_of_newton_s_method():
    rows = build_rows()
    fit = fit_logistic(rows, NUM_CLASSES, strength=STRENGTH, max_iterations=500)
    expected = solve_by_newton(rows, STRENGTH)
    torch.testing.assert_close(fit.weight_ND, expected[:, :WIDTH], atol=1e-6, rtol=1e-6)
    bias_N = expected[:, WIDTH]
    torch.testing.assert_close(fit.bias_N - fit.bias_N.mean(), bias_N - bias_N.mean(), atol=1e-6, rtol=1e-6)


def test_the_gradient_vanishes_at_the_fit_and_the_bias_is_not_penalised():
    rows = build_rows()
    fit = fit_logistic(rows, NUM_CLASSES, strength=STRENGTH, max_iterations=500)
    error_SN = fit.logits(rows.feature_SD).softmax(1) - F.one_hot(rows.label_S, NUM_CLASSES)
    weight_gradient = error_SN.T @ rows.feature_SD / NUM_ROWS + STRENGTH * fit.weight_ND
    assert weight_gradient.abs().max() < 1e-6
    assert error_SN.mean(0).abs().max() < 1e-6
    assert fit.gradient == pytest.approx(max(weight_gradient.abs().max().item(), error_SN.mean(0).abs().max().item()), abs=1e-9)


def test_working_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    rows = build_rows()
    whole = fit_logistic(rows, NUM_CLASSES, strength=STRENGTH, max_iterations=500)
    measured = measure_rows(whole, rows)
    monkeypatch.setattr("sycoca.finetune.linear_probe.ROWS_A_CHUNK", 5)
    torch.testing.assert_close(
        fit_logistic(rows, NUM_CLASSES, strength=STRENGTH, max_iterations=500).weight_ND, whole.weight_ND, atol=1e-6, rtol=1e-5
    )
    assert measure_rows(whole, rows) == measured


def test_the_search_does_as_well_as_every_strength_it_could_start_from():
    config = probe_config(Path("nowhere"))
    rows = build_rows(90, noise=3.0, width=40)
    strength, score = choose_strength(rows, NUM_CLASSES, config)
    order_S = torch.randperm(90, generator=torch.Generator().manual_seed(config.seed))
    held_out, kept = (LabelledRows(*(part[place_S] for part in rows)) for place_S in (order_S[:9], order_S[9:]))
    scores = {
        exponent: measure_rows(fit_logistic(kept, NUM_CLASSES, strength=10**exponent, max_iterations=1000), held_out)["top_1"]
        for exponent in FIRST_EXPONENTS
    }
    assert score >= max(scores.values()) > min(scores.values())
    again = fit_logistic(kept, NUM_CLASSES, strength=strength, max_iterations=1000)
    assert measure_rows(again, held_out)["top_1"] == score


def probe_config(folder: Path, **changes: object) -> LinearProbeConfig:
    tree = {
        "start": {"checkpoint": str(folder / "start")}, "train": {"images": [str(folder / "train")]},
        "val": {"images": [str(folder / "val")]}, "batch_size": 4, "num_workers": 0, **changes,
    }  # fmt: skip
    return parse_config(LinearProbeConfig, tree, source="tests")


def write_data(folder: Path) -> None:
    save_start(folder / "start")
    write_images(folder / "train", num_each=5)
    write_images(folder / "val", num_each=3)


@pytest.mark.parametrize("pool", ["embedding", "mean", "max", "cls"])
def test_colours_are_separable(tmp_path: Path, pool: str):
    write_data(tmp_path)
    figures = linear_probe(probe_config(tmp_path, pool=pool), torch.device("cpu"))
    assert (figures["top_1"], figures["top_5"], figures["mean_per_class"], figures["num_images"]) == (100.0, 100.0, 100.0, 9.0)
    assert figures["held_out_top_1"] == 100.0
    assert figures["gradient"] < 1e-4


def test_features_stand_in_the_order_of_keys_whatever_the_batches(tmp_path: Path):
    write_data(tmp_path)
    records = load_class_records([str(tmp_path / "train")])
    start = start_from(StartConfig(checkpoint=str(tmp_path / "start")), parts={"contrast"})
    found = [encode_rows(start, records, probe_config(tmp_path, batch_size=size)) for size in (2, 15)]
    torch.testing.assert_close(found[0].feature_SD, found[1].feature_SD)
    assert found[0].label_S.tolist() == found[1].label_S.tolist() == [label for label in range(3) for _ in range(5)]
    assert records.class_names == tuple(sorted(COLOURS))


def test_a_training_set_that_is_too_small_is_refused(tmp_path: Path):
    write_data(tmp_path)
    with pytest.raises(DataError, match="too few"):
        choose_strength(build_rows(1), NUM_CLASSES, probe_config(tmp_path))
