"""Packed rows against the same stack over padded texts."""

import pytest
import torch
from torch import Tensor

from sycoca.models.blocks import PreNormBlock, Stack
from sycoca.models.packing import ROUND_ROWS_TO, Packing

LENGTHS = [[3, 7, 1], [8, 8, 8], [0, 2, 0], list(range(1, 41))]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_real_row_goes_back_to_its_place(length: list[int]):
    length_B, num_places = torch.tensor(length), max(length)
    x_BLD = torch.randn(len(length), num_places, 2)
    packing = Packing(length_B, num_places)
    padded_BLD = packing.pad(packing.pack(x_BLD))
    for row, num_real in enumerate(length):
        assert padded_BLD[row, :num_real].equal(x_BLD[row, :num_real])
    assert ((padded_BLD == x_BLD) | (padded_BLD == 0)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_as_many_as_real_tokens_rounded_up(length: list[int]):
    num_rows = Packing(torch.tensor(length), max(length)).place_N.numel()
    num_real, num_places = sum(length), len(length) * max(length)
    assert num_rows == min(-(-num_real // ROUND_ROWS_TO) * ROUND_ROWS_TO, num_places)


def make_stack(*, recompute: bool) -> Stack:
    torch.manual_seed(0)
    blocks = [PreNormBlock(8, 2, is_causal=True, memory_width=6) for _ in range(2)]
    return Stack(blocks, 8, recompute=recompute).double()


def gradients(stack: Stack, real_ND: Tensor) -> list[Tensor]:
    (real_ND * torch.linspace(-1, 1, real_ND.numel()).view_as(real_ND)).sum().backward()
    return [parameter.grad.clone() for parameter in stack.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
def test_states_and_gradients_equal_those_of_the_padded_batch(recompute: bool):
    length_B = torch.tensor([3, 40, 1, 25])
    x_BLD, memory_BMF = torch.randn(4, 40, 8).double(), torch.randn(4, 5, 6).double()
    is_real_BL = torch.arange(40) < length_B[:, None]
    packing = Packing(length_B, 40)
    assert packing.place_N.numel() < 4 * 40
    packed, padded = make_stack(recompute=recompute), make_stack(recompute=recompute)
    packed_ND = packing.pad(packed(packing.pack(x_BLD), memory_BMF, packing=packing))[is_real_BL]
    padded_ND = padded(x_BLD, memory_BMF)[is_real_BL]
    torch.testing.assert_close(packed_ND, padded_ND, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(packed, packed_ND), gradients(padded, padded_ND), rtol=1e-10, atol=1e-12)
