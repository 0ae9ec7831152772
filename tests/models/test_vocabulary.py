"""The chunked linear cross-entropy against PyTorch's in float64, and what it holds in memory."""

import math

import pytest
import torch
from builders import VISION_WIDTH, build_model, model_config
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sycoca.models.sycoca import SyCoCa
from sycoca.models.text_decoder import TextDecoder, TextDecoderConfig
from sycoca.models.vocabulary import linear_cross_entropy

NUM_ROWS, WIDTH, NUM_WORDS = 11, 8, 29


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    state_ND = torch.randn(NUM_ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(NUM_WORDS, WIDTH, dtype=dtype, requires_grad=True)
    return state_ND, weight_VD, torch.randint(0, NUM_WORDS, (NUM_ROWS,))


def expected_loss(state_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tensor:
    return F.cross_entropy(state_ND.double() @ weight_VD.double().T, label_N, reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, NUM_ROWS, 100])
def test_value_and_gradients_equal_the_plain_cross_entropy(rows: int):
    state_ND, weight_VD, label_N = make_inputs()
    loss = linear_cross_entropy(state_ND, weight_VD, label_N, rows)
    expected = expected_loss(state_ND, weight_VD, label_N)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(0.3 * loss, [state_ND, weight_VD])
    torch.testing.assert_close(actual, torch.autograd.grad(0.3 * expected, [state_ND, weight_VD]))


@pytest.mark.parametrize("rows", [4, 100])
def test_smoothed_value_and_gradients_equal_the_plain_ones(rows: int):
    state_ND, weight_VD, label_N = make_inputs()
    loss = linear_cross_entropy(state_ND, weight_VD, label_N, rows, smoothing=0.3)
    expected = F.cross_entropy(state_ND @ weight_VD.T, label_N, reduction="sum", label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, [state_ND, weight_VD])
    torch.testing.assert_close(actual, torch.autograd.grad(expected, [state_ND, weight_VD]))


def test_large_logits_do_not_overflow():
    state_ND, weight_VD, label_N = make_inputs(torch.float32)
    loss = linear_cross_entropy(100 * state_ND, weight_VD, label_N, 4)
    torch.testing.assert_close(loss.double(), expected_loss(100 * state_ND, weight_VD, label_N))


def test_no_rows_cost_nothing():
    state_ND, weight_VD, label_N = make_inputs()
    loss = linear_cross_entropy(state_ND[:0], weight_VD, label_N[:0])
    loss.backward()
    assert loss == 0 and weight_VD.grad is not None and (weight_VD.grad == 0).all()


@pytest.mark.parametrize("needs", ["state", "weight"])
def test_a_locked_side_gets_no_gradient_and_the_other_its_own(needs: str):
    state_ND, weight_VD, label_N = make_inputs()
    expected = torch.autograd.grad(expected_loss(state_ND, weight_VD, label_N), [state_ND, weight_VD])
    (weight_VD if needs == "state" else state_ND).requires_grad_(False)
    linear_cross_entropy(state_ND, weight_VD, label_N, 4).backward()
    assert (state_ND.grad is None, weight_VD.grad is None) == (needs == "weight", needs == "state")
    torch.testing.assert_close(state_ND.grad if needs == "state" else weight_VD.grad, expected[needs == "weight"])


def test_under_bf16_autocast_loss_and_gradients_are_close_and_float32():
    state_ND, weight_VD, label_N = make_inputs(torch.float32)
    expected = expected_loss(state_ND, weight_VD, label_N)
    wanted = torch.autograd.grad(expected, [state_ND, weight_VD])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(state_ND, weight_VD, label_N, 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=0)
    for actual, grad in zip(torch.autograd.grad(loss, [state_ND, weight_VD]), wanted, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - grad).norm() / grad.norm() < 2e-2


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return made


def test_logits_of_all_tokens_are_never_held_at_once():
    num_rows, num_words = 128, 64
    state_ND = torch.randn(num_rows, WIDTH, requires_grad=True)
    weight_VD = torch.randn(num_words, WIDTH, requires_grad=True)
    label_N = torch.randint(0, num_words, (num_rows,))
    with LargestTensor() as largest:
        linear_cross_entropy(state_ND, weight_VD, label_N, 10).backward()
    assert largest.num_elements <= max(10 * num_words, num_rows * WIDTH), "one chunk of logits, or the states"
    with LargestTensor() as largest:
        F.cross_entropy(state_ND @ weight_VD.T, label_N).backward()
    assert largest.num_elements == num_rows * num_words, "the measure sees logits that are held whole"


def test_training_the_decoder_never_holds_the_logits_of_all_tokens():
    """700 tokens are two chunks of the default size."""
    model = build_model({"text", "text_decoder"}, text={"width": 12, "num_layers": 1, "num_heads": 2, "mlp_ratio": 1.0})
    decoder = TextDecoder(
        TextDecoderConfig(num_layers=1, mlp_ratio=1.0), width=12, num_heads=2, memory_width=VISION_WIDTH, vocab_size=200
    )
    torch.nn.init.normal_(decoder.vocabulary.weight)
    token_BLD, _ = model.text(torch.randint(0, 29, (100, 7)), torch.full((100,), 7))
    label_BL = torch.randint(0, 200, (100, 7))
    memory = torch.randn(100, 2, VISION_WIDTH)
    with LargestTensor() as largest:
        decoder(token_BLD, memory, label_BL).backward()
    assert largest.num_elements <= 512 * 200 < 700 * 200


def test_labels_that_are_negative_are_left_out():
    decoder = build_model({"text", "text_decoder"}).text_decoder
    token_BLD, memory, label_BL = torch.randn(2, 5, 12), torch.randn(2, 6, VISION_WIDTH), torch.randint(0, 29, (2, 5))
    label_BL[0, 2:], label_BL[1, 0] = -100, 0
    logit_BLV = decoder(token_BLD, memory).double()
    expected = F.cross_entropy(logit_BLV.flatten(0, 1), label_BL.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(decoder(token_BLD, memory, label_BL).double(), expected)


@pytest.mark.parametrize(("width", "num_words"), [(16, 300), (512, 49_408)])
@torch.no_grad()
def test_the_first_caption_loss_is_that_of_guessing(width: int, num_words: int):
    """Within 5 % of ln V; open_clip's CoCa starts at twice that (#551)."""
    text = {"width": width, "num_layers": 1, "num_heads": 2}
    model = SyCoCa(model_config(text=text), vocab_size=num_words, max_tokens=7, parts={"text", "text_decoder"})
    token_BL = torch.randint(0, num_words, (8, 7))
    token_BLD, _ = model.text(token_BL, torch.full((8,), 7))
    label_BL = torch.randint(0, num_words, (8, 7))
    loss = model.text_decoder(token_BLD, torch.randn(8, 6, VISION_WIDTH), label_BL) / label_BL.numel()
    assert abs(loss / math.log(num_words) - 1) < 0.05
