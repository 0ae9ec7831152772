"""Linear maps in closed form: what they recover, what they promise, and what they refuse."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sycoca.captioners.aligner import AlignerFit, PairBlock, fit_map
from sycoca.captioners.linear_aligner import LinearAligner, load_aligner
from sycoca.captioners.transform import EmbeddingTransform, fit_transform
from sycoca.types import ConfigError, DataError

N, E, F = 67, 7, 5


def rows(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(rows(width, width, seed))[0]


def blocks(source: Tensor, target: Tensor, *, size: int = 20) -> Iterator[PairBlock]:
    for start in range(0, len(source), size):
        yield PairBlock(source[start : start + size], target[start : start + size])


def fit_of(source: Tensor, target: Tensor, count: Tensor | None = None) -> AlignerFit:
    fit = AlignerFit(source.shape[1], target.shape[1])
    fit.update(source, target, count)
    return fit


@pytest.mark.parametrize("method", ["ols", "procrustes", "robust"])
def test_a_planted_rotation_is_recovered(method):
    source, planted = rows(N, E), rotation(E)
    found = fit_map(partial(blocks, source, source @ planted), method)
    torch.testing.assert_close(found, planted)


def test_ols_recovers_any_linear_map_and_equals_least_squares():
    source, target = rows(N, E), rows(N, F, 1)
    planted = rows(E, F, 2)
    torch.testing.assert_close(fit_of(source, source @ planted).solve("ols"), planted)
    torch.testing.assert_close(fit_of(source, target).solve("ols"), torch.linalg.lstsq(source, target).solution)


def test_ols_of_fewer_pairs_than_dimensions_has_least_norm():
    source, target = rows(E - 3, E), rows(E - 3, F, 1)
    torch.testing.assert_close(fit_of(source, target).solve("ols"), torch.linalg.pinv(source) @ target)


def test_ridge_is_least_squares_with_rows_added_for_the_penalty():
    source, target, ridge = rows(N, E), rows(N, F, 1), 3.0
    longer = torch.cat([source, ridge**0.5 * torch.eye(E, dtype=torch.float64)])
    expected = torch.linalg.lstsq(longer, torch.cat([target, torch.zeros(E, F, dtype=torch.float64)])).solution
    torch.testing.assert_close(fit_of(source, target).solve("ridge", ridge=ridge), expected)


@pytest.mark.parametrize(("source_width", "target_width"), [(E, E), (E, F), (F, E)])
@pytest.mark.parametrize("method", ["procrustes", "robust"])
def test_procrustes_maps_are_orthonormal_also_where_they_are_rectangular(method, source_width: int, target_width: int):
    weight = fit_map(partial(blocks, rows(N, source_width), rows(N, target_width, 1)), method)
    assert weight.shape == (source_width, target_width)
    product = weight.T @ weight if target_width <= source_width else weight @ weight.T
    torch.testing.assert_close(product, torch.eye(len(product), dtype=torch.float64))


def test_the_residual_on_the_training_pairs_orders_the_methods():
    source = rows(N, E)
    target = source @ rotation(E) + 0.5 * rows(N, E, 1)
    fit = fit_of(source, target)
    residual = {name: (source @ fit.solve(name) - target).norm() for name in ("ols", "ridge", "procrustes")}
    assert residual["ols"] < residual["ridge"]
    assert residual["ols"] < residual["procrustes"]
    for seed in range(3):
        assert residual["procrustes"] <= (source @ rotation(E, seed) - target).norm()


@pytest.mark.parametrize("method", ["ols", "ridge", "procrustes"])
@pytest.mark.parametrize("size", [1, 20, N])
def test_streaming_equals_the_whole_batch(method, size: int):
    source, target = rows(N, E), rows(N, F, 1)
    streamed = fit_map(partial(blocks, source, target, size=size), method)
    torch.testing.assert_close(streamed, fit_of(source, target).solve(method), rtol=1e-9, atol=1e-11)


def test_the_order_of_merging_does_not_matter():
    parts = [fit_of(*block) for block in blocks(rows(N, E), rows(N, F, 1))]
    forwards, backwards = AlignerFit(E, F), AlignerFit(E, F)
    for part in parts:
        forwards.merge(part)
    for part in reversed(parts):
        backwards.merge(part)
    assert forwards.num_pairs == N
    for method in ("ols", "procrustes"):
        expected = fit_of(rows(N, E), rows(N, F, 1)).solve(method)
        torch.testing.assert_close(forwards.solve(method), expected)
        torch.testing.assert_close(backwards.solve(method), expected)


@pytest.mark.parametrize("method", ["ols", "ridge", "procrustes"])
def test_counts_and_summed_targets_give_the_expanded_regression(method):
    source, count = rows(11, E), torch.tensor([3, 1, 4, 1, 5, 2, 6, 0, 2, 5, 3])
    expanded = source.repeat_interleave(count, dim=0)
    target = rows(len(expanded), F, 1)
    summed = torch.stack([part.sum(0) for part in target.split(count.tolist())])
    fit = fit_of(source, summed, count)
    assert fit.num_pairs == count.sum()
    torch.testing.assert_close(fit.solve(method), fit_of(expanded, target).solve(method))


@pytest.mark.parametrize("method", ["ols", "procrustes"])
def test_centring_by_the_sums_equals_centring_the_rows(method):
    source, target = rows(N, E) + 4, rows(N, F, 1) - 3
    expected = fit_of(source - source.mean(0), target - target.mean(0)).solve(method)
    torch.testing.assert_close(fit_of(source, target).solve(method, is_centred=True), expected)


def test_the_robust_map_heeds_wrong_pairs_less():
    source, planted = rows(N, E), rotation(E)
    target = source @ planted + 0.01 * rows(N, E, 1)
    target[: N // 4] = 5 * rows(N // 4, E, 2)
    plain, robust = (fit_map(partial(blocks, source, target), method) for method in ("procrustes", "robust"))
    assert (robust - planted).norm() < 0.1 * (plain - planted).norm()


def test_closed_forms_build_no_graph_and_leave_their_rows_alone():
    source, target = rows(N, E).requires_grad_(), rows(N, F, 1).requires_grad_()
    before = source.detach().clone()
    for method in ("ols", "ridge", "procrustes", "robust"):
        weight = fit_map(partial(blocks, source, target), method)
        assert weight.grad_fn is None and not weight.requires_grad
    assert torch.equal(source, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused(value: float):
    target = rows(N, F)
    target[3, 2] = value
    with pytest.raises(DataError, match="finite"):
        AlignerFit(E, F).update(rows(N, E), target)


def test_bad_fits_are_refused():
    with pytest.raises(DataError, match="found none"):
        AlignerFit(E, F).solve("ols")
    with pytest.raises(DataError, match="found none"):
        fit_map(lambda: iter(()), "ols")
    with pytest.raises(DataError, match="7 to 5 numbers"):
        AlignerFit(E, F).update(rows(N, F), rows(N, F))
    with pytest.raises(DataError, match="as many rows"):
        AlignerFit(E, F).update(rows(N, E), rows(N - 1, F))
    with pytest.raises(DataError, match="negative"):
        AlignerFit(E, F).update(rows(2, E), rows(2, F), torch.tensor([1, -1]))
    with pytest.raises(DataError, match="other spaces"):
        AlignerFit(E, F).merge(AlignerFit(F, E))
    with pytest.raises(ConfigError, match="needs the rows"):
        fit_of(rows(N, E), rows(N, F)).solve("robust")
    with pytest.raises(ConfigError, match="above 0"):
        fit_of(rows(N, E), rows(N, F)).solve("ridge", ridge=0)
    with pytest.raises(ConfigError, match="'lasso'"):
        fit_map(lambda: blocks(rows(N, E), rows(N, F)), "lasso")  # pyright: ignore[reportArgumentType]


def build_aligner() -> LinearAligner:
    source, target = rows(N, E) + 2, rows(N, F, 1) - 1
    source_transform = fit_transform(["l2", "centre"], lambda: [source])
    target_transform = fit_transform(["zscore"], lambda: [target])
    weight = fit_of(source_transform(source), target_transform(target)).solve("ols")
    return LinearAligner(weight, source_transform, target_transform, "images", "words", "ols", N)


def test_a_saved_aligner_maps_as_before(tmp_path: Path):
    aligner = build_aligner()
    aligner.save(tmp_path / "deep" / "aligner.safetensors")
    loaded = load_aligner(tmp_path / "deep" / "aligner.safetensors")
    queries = rows(3, E, 5).float()
    expected = aligner.source_transform(queries) @ aligner.weight_EF.float()
    assert torch.equal(aligner.apply(queries), expected)
    assert torch.equal(loaded.apply(queries), expected)
    assert torch.equal(loaded.embed_target(rows(3, F)), aligner.embed_target(rows(3, F)))
    assert (loaded.method, loaded.num_pairs) == ("ols", N)
    loaded.check_spaces(source="images", target="words")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["aligner.safetensors"]


def test_an_aligner_refuses_another_encoder_width_or_file(tmp_path: Path):
    aligner = build_aligner()
    with pytest.raises(DataError, match="do not belong together"):
        aligner.check_spaces(source="words", target="words")
    with pytest.raises(DataError, match="do not belong together"):
        aligner.check_spaces(source="images", target="images")
    with pytest.raises(DataError, match="rows of 7 numbers, got 5"):
        aligner.apply(rows(2, F))
    with pytest.raises(DataError, match="no such linear aligner"):
        load_aligner(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(DataError, match="not a linear aligner"):
        load_aligner(tmp_path / "text")


def test_the_identity_is_the_transform_of_no_steps():
    assert torch.equal(EmbeddingTransform()(rows(3, E)), rows(3, E))
