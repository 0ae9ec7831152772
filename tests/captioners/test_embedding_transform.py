"""l2, centre and zscore, alone and one after the other, fitted in blocks."""

import pytest
import torch
from torch import Tensor

from sycoca.captioners.transform import EmbeddingTransform, fit_transform, from_tensors
from sycoca.types import ConfigError, DataError

N, E = 23, 6


def train_rows() -> Tensor:
    return torch.randn(N, E, generator=torch.Generator().manual_seed(1)) * torch.arange(1, E + 1) + 100


def fit(*kinds: str, size: int = 5) -> EmbeddingTransform:
    return fit_transform(kinds, lambda: train_rows().split(size))


def test_each_step_is_what_it_says():
    rows = train_rows()
    mean, std = rows.double().mean(0), rows.double().std(0, unbiased=False)
    torch.testing.assert_close(fit("none")(rows), rows)
    torch.testing.assert_close(fit("l2")(rows), rows / rows.norm(dim=1, keepdim=True))
    torch.testing.assert_close(fit("centre")(rows.double()), rows.double() - mean)
    torch.testing.assert_close(fit("zscore")(rows.double()), (rows.double() - mean) / std)


def test_a_later_step_is_fitted_on_what_the_earlier_ones_leave():
    rows = train_rows().double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(fit("l2", "centre")(rows), unit - unit.mean(0))
    torch.testing.assert_close(fit("centre", "l2")(rows).norm(dim=1), torch.ones(N).double())


@pytest.mark.parametrize("size", [1, 7, N])
def test_blocks_of_any_size_give_the_same_fit(size: int):
    rows = train_rows().double()
    torch.testing.assert_close(fit("zscore", size=size)(rows), fit("zscore", size=N)(rows))


def test_a_number_that_never_changes_stays_finite():
    rows = torch.cat([train_rows(), torch.full((N, 1), 3.0)], dim=1)
    out = fit_transform(["zscore"], lambda: [rows])(rows)
    assert out.isfinite().all()
    assert (out[:, -1] == 0).all()


def test_held_out_rows_are_moved_by_the_training_statistics():
    held_out = train_rows() + 50
    assert (fit("centre")(held_out).mean(0) > 40).all()


def test_a_transform_comes_back_from_its_tensors():
    transform = fit("l2", "zscore", "centre")
    again = from_tensors(transform.kinds, transform.tensors("x."), "x.")
    assert torch.equal(again(train_rows()), transform(train_rows()))
    assert again.fingerprint == transform.fingerprint
    kinds = ((), ("l2",), ("centre",), ("zscore",), ("whiten",), ("l2", "centre"))
    assert len({fit(*some).fingerprint for some in kinds}) == len(kinds)


def test_whitened_rows_are_uncorrelated_and_directions_without_variance_stay_empty():
    rows = train_rows().double()
    mixed = torch.cat([rows, rows[:, :1] + rows[:, 1:2]], dim=1)
    transform = fit_transform(["whiten"], lambda: mixed.split(7))
    out = transform(mixed)
    product_EE = out.T @ out / N
    torch.testing.assert_close(out.mean(0), torch.zeros(E + 1).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(product_EE @ product_EE, product_EE, atol=1e-6, rtol=0)
    assert round(product_EE.trace().item()) == E
    again = from_tensors(transform.kinds, transform.tensors("x."), "x.")
    assert torch.equal(again(mixed), out)


def test_then_l2_is_added_once():
    transform = fit("l2", "centre")
    assert transform.then_l2().kinds == ["l2", "centre", "l2"]
    assert transform.then_l2().then_l2().kinds == ["l2", "centre", "l2"]


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ConfigError, match="'rotate'"):
        fit("rotate")
    with pytest.raises(DataError, match="found none"):
        fit_transform(["centre"], lambda: [])
    with pytest.raises(DataError, match="NaN"):
        fit_transform(["centre"], lambda: [torch.tensor([[1.0, torch.nan]])])
    with pytest.raises(DataError, match="rows of 6 numbers and got 5"):
        fit("centre")(torch.zeros(2, 5))
