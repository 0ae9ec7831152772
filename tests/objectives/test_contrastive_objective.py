"""Image-text contrast against plain loops in float64: value, gradients, temperature, duplicates, precision."""

import math

import pytest
import torch
from builders import EMBED_WIDTH, build_batch
from torch import Tensor

from sycoca.objectives.chunked_contrast import is_same_name
from sycoca.objectives.contrastive import ContrastiveConfig, ContrastiveObjective, pair_names
from sycoca.types import Batch, Features, Metrics

NUM_PAIRS = 5


def make_rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(NUM_PAIRS, EMBED_WIDTH, generator=generator) for _ in range(2)]
    image_BE, text_BE = (torch.nn.functional.normalize(row, dim=-1).requires_grad_() for row in rows)
    return image_BE, text_BE


def run(objective: ContrastiveObjective, image_BE: Tensor, text_BE: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    nothing = torch.zeros(0)
    return objective(None, batch, Features(nothing, nothing, None, image_BE, text_BE))


def expected_loss(image: Tensor, text: Tensor, log_scale: Tensor, is_left_out: list[list[bool]]) -> Tensor:
    """Both directions' mean of -log(right / all that count), with autograd in float64 on top of the loops."""
    scale, num, total = log_scale.exp().squeeze(), image.shape[0], torch.zeros((), dtype=torch.float64)
    for i in range(num):
        for query, others in ((image[i], text), (text[i], image)):
            counted = [j for j in range(num) if j == i or not is_left_out[i][j]]
            logits = {j: scale * sum(a * b for a, b in zip(query, others[j])) for j in counted}
            total = total - (logits[i] - sum(logit.exp() for logit in logits.values()).log())
    return total / (2 * num)


NOTHING_LEFT_OUT = [[False] * NUM_PAIRS for _ in range(NUM_PAIRS)]


def check_against_loops(objective: ContrastiveObjective, batch: Batch, is_left_out: list[list[bool]]) -> None:
    image_BE, text_BE = make_rows()
    loss, _ = run(objective, image_BE, text_BE, batch)
    image, text = (rows.detach().double().requires_grad_() for rows in (image_BE, text_BE))
    log_scale = objective.log_logit_scale.detach().double().requires_grad_()
    expected = expected_loss(image, text, log_scale, is_left_out)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    actual = torch.autograd.grad(loss, [image_BE, text_BE, objective.log_logit_scale])
    wanted = torch.autograd.grad(expected, [image, text, log_scale])
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.02])
def test_loss_and_gradients_equal_the_loops(temperature: float):
    objective = ContrastiveConfig(init_temperature=temperature).build()
    check_against_loops(objective, build_batch(NUM_PAIRS), NOTHING_LEFT_OUT)


def batch_with_duplicates() -> Batch:
    """Captions 0 and 3 are the same words; images 1 and 2 are one image with two captions."""
    batch = build_batch(NUM_PAIRS)
    batch["token"][3], batch["length"][3] = batch["token"][0], batch["length"][0]
    batch["key"] = ["a", "b#0", "b#1", "c", "bb#0"]
    return batch


DUPLICATES = {(0, 3), (3, 0), (1, 2), (2, 1)}


def test_duplicates_are_left_out_of_the_negatives():
    is_left_out = [[(i, j) in DUPLICATES for j in range(NUM_PAIRS)] for i in range(NUM_PAIRS)]
    check_against_loops(ContrastiveConfig(mask_duplicates=True).build(), batch_with_duplicates(), is_left_out)


def test_without_the_option_duplicates_stay_negatives():
    check_against_loops(ContrastiveConfig().build(), batch_with_duplicates(), NOTHING_LEFT_OUT)


def same_pairs(batch: Batch) -> Tensor:
    name_B2 = pair_names(batch)
    return is_same_name(name_B2, name_B2)


def test_pairs_are_the_same_by_caption_or_by_the_key_before_its_number():
    expected = [[i == j or (i, j) in DUPLICATES for j in range(NUM_PAIRS)] for i in range(NUM_PAIRS)]
    assert same_pairs(batch_with_duplicates()).tolist() == expected


def test_captions_that_differ_only_in_padding_are_the_same():
    batch = batch_with_duplicates()
    batch["token"][1] = torch.tensor([27, 5, 28, 0, 0])
    batch["token"][2] = torch.tensor([27, 5, 28, 9, 9])
    batch["length"][1:3] = 3
    batch["key"] = list("abcde")
    assert same_pairs(batch)[1].tolist() == [False, True, True, False, False]


def test_a_batch_of_one_caption_alone_has_no_negatives_and_no_loss():
    batch = build_batch(NUM_PAIRS)
    batch["key"] = ["a"] * NUM_PAIRS
    loss, _ = run(ContrastiveConfig(mask_duplicates=True).build(), *make_rows(), batch)
    assert loss.item() == 0.0


@pytest.mark.parametrize("log_scale", [math.log(100) + 1e-3, 10.0, 1000.0])
def test_the_scale_is_clamped_at_100_and_every_gradient_is_finite(log_scale: float):
    objective = ContrastiveConfig().build()
    torch.nn.init.constant_(objective.log_logit_scale, log_scale)
    image_BE, text_BE = make_rows()
    loss, metrics = run(objective, image_BE, text_BE, build_batch(NUM_PAIRS))
    loss.backward()
    assert float(metrics["logit_scale"]) == pytest.approx(100.0)
    at_100 = expected_loss(image_BE.double(), text_BE.double(), torch.tensor(100.0).double().log(), NOTHING_LEFT_OUT)
    assert loss.item() == pytest.approx(at_100.item(), rel=1e-4)
    for tensor in (image_BE, text_BE, objective.log_logit_scale):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


def test_the_scale_starts_at_the_inverse_temperature():
    _, metrics = run(ContrastiveConfig(init_temperature=0.05).build(), *make_rows(), build_batch(NUM_PAIRS))
    assert float(metrics["logit_scale"]) == pytest.approx(20.0)


def test_similarities_are_float32_under_autocast():
    objective, rows, batch = ContrastiveConfig(init_temperature=0.02).build(), make_rows(), build_batch(NUM_PAIRS)
    expected, _ = run(objective, *rows, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = run(objective, *rows, batch)
    assert loss.dtype == torch.float32 and loss.equal(expected)


def test_accuracy_is_the_share_of_rows_whose_best_match_is_their_own():
    image_BE = torch.eye(NUM_PAIRS, EMBED_WIDTH)
    text_BE = image_BE[[0, 1, 2, 4, 3]]
    _, metrics = run(ContrastiveConfig().build(), image_BE, text_BE, build_batch(NUM_PAIRS))
    assert float(metrics["accuracy"]) == pytest.approx(3 / 5)


def test_an_untrained_model_guesses():
    """Equal embeddings: ln G."""
    same_BE = torch.ones(NUM_PAIRS, EMBED_WIDTH) / math.sqrt(EMBED_WIDTH)
    loss, _ = run(ContrastiveConfig().build(), same_BE, same_BE, build_batch(NUM_PAIRS))
    assert float(loss) == pytest.approx(math.log(NUM_PAIRS))
