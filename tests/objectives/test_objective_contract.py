"""What holds for every objective, and for every row of the ablation (objectives/base.py)."""

import pytest
import torch
from builders import (
    ABLATION_ROWS,
    NUM_TOKENS,
    Objectives,
    assert_same_gradients,
    build_batch,
    build_task,
    run_backward,
    take_rows,
    vision_options,
)

from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.types import Batch

EVERY_ROW = pytest.mark.parametrize("configs", ABLATION_ROWS.values(), ids=ABLATION_ROWS)
OTHER_ENCODINGS: dict[str, Objectives] = {
    encode: ABLATION_ROWS["coca"] | {"tg_mim": MaskedImageConfig(encode=encode)} for encode in ("mask_tokens", "features")
}
DETERMINISTIC = {name: row for name, row in ABLATION_ROWS.items() if "random" not in name} | OTHER_ENCODINGS
EVERY_DETERMINISTIC_ROW = pytest.mark.parametrize("configs", DETERMINISTIC.values(), ids=DETERMINISTIC)
POOLS = ["cls", "mean", "max", "attention"]


@EVERY_ROW
def test_losses_are_finite_scalars_and_metrics_are_detached(configs: Objectives):
    task = build_task(configs)
    features = task.encode(build_batch())
    for objective in task.members().values():
        loss, metrics = objective(task.model, build_batch(), features)
        assert loss.shape == () and loss.isfinite() and loss.requires_grad
        assert all(value.shape == () and not value.requires_grad and value.isfinite() for value in metrics.values())
        assert metrics["loss"].equal(loss.detach())


@EVERY_ROW
def test_the_tasks_loss_is_the_weighted_sum(configs: Objectives):
    loss, metrics = build_task(configs)(build_batch())
    expected = sum(config.weight * metrics[f"{name}/loss"] for name, config in configs.items())
    torch.testing.assert_close(loss.detach(), expected)
    assert metrics["loss"].equal(loss.detach())
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@EVERY_DETERMINISTIC_ROW
@torch.no_grad()
def test_permuting_the_batch_leaves_the_loss_as_it_is(configs: Objectives):
    task, batch = build_task(configs), build_batch()
    expected = task(batch)[0]
    torch.testing.assert_close(task(take_rows(batch, [2, 0, 3, 1]))[0], expected)
    assert not torch.isclose(task(take_rows(batch, [2, 0, 3, 3]))[0], expected)


def with_other_padding(batch: Batch) -> Batch:
    """Two columns more, and words in all of the padding."""
    longer_BL = torch.nn.functional.pad(batch["token"], (0, 2))
    is_real_BL = torch.arange(NUM_TOKENS + 2) < batch["length"][:, None]
    return Batch(**{**batch, "token": torch.where(is_real_BL, longer_BL, 11)})


@EVERY_DETERMINISTIC_ROW
def test_the_padding_does_not_matter_for_loss_and_gradients(configs: Objectives):
    task, batch = build_task(configs), build_batch()
    loss, expected = run_backward(task, batch)
    other_loss, actual = run_backward(task, with_other_padding(batch))
    torch.testing.assert_close(other_loss, loss)
    assert_same_gradients(actual, expected)


@EVERY_ROW
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("has_class_token", [True, False])
def test_every_parameter_that_is_built_gets_a_gradient(configs: Objectives, pool: str, has_class_token: bool):
    """A parameter without one makes DDP fail on its second step."""
    vision = vision_options() if has_class_token else vision_options(class_token=False)
    _, found = run_backward(build_task(configs, pool=pool, vision=vision), build_batch())
    unused = [name for name, grad in found.items() if grad.count_nonzero() == 0 or not grad.isfinite().all()]
    assert unused == []


@pytest.mark.parametrize("configs", OTHER_ENCODINGS.values(), ids=OTHER_ENCODINGS)
def test_every_parameter_gets_a_gradient_however_masked_images_are_encoded(configs: Objectives):
    _, found = run_backward(build_task(configs), build_batch())
    assert [name for name, grad in found.items() if grad.count_nonzero() == 0] == []


@pytest.mark.parametrize("locked", [["vision"], ["text"], ["vision", "text"]])
def test_a_locked_tower_gets_no_gradient_and_the_rest_does(locked: list):
    task = build_task(ABLATION_ROWS["sycoca"], locked=locked)
    _, found = run_backward(task, build_batch())
    assert not any(name.startswith(tuple(f"model.{tower}." for tower in locked)) for name in found)
    assert all(grad.count_nonzero() > 0 for grad in found.values())


@EVERY_ROW
def test_every_row_trains_in_bf16(configs: Objectives):
    exact, _ = run_backward(build_task(configs), build_batch())
    loss, found = run_backward(build_task(configs, is_bf16=True), build_batch())
    torch.testing.assert_close(loss, exact, rtol=5e-2, atol=0)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found.values())
