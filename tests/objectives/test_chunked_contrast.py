"""The contrastive loss in chunks of rows against the whole matrix, in float64; other world sizes are in distributed/."""

import pytest
import torch
from builders import EMBED_WIDTH, build_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sycoca.config import parse_config
from sycoca.objectives.chunked_contrast import chunked_info_nce
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.types import Batch, ConfigError, Features, Metrics

NUM_PAIRS = 7
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def batch_with_duplicates() -> Batch:
    batch = build_batch(NUM_PAIRS)
    batch["token"][3], batch["length"][3] = batch["token"][0], batch["length"][0]
    batch["key"] = ["a", "b#0", "b#1", "c", "d", "e", "b#2"]
    return batch


def run(chunk_rows: int, *, is_masked: bool, weight: float = 1.0) -> tuple[Metrics, list[Tensor]]:
    """Metrics, and the gradients of `weight` times the loss by images, captions and temperature, all in float64."""
    objective = ContrastiveConfig(chunk_rows=chunk_rows, mask_duplicates=is_masked, init_temperature=0.2).build()
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(NUM_PAIRS, EMBED_WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    image_BE, text_BE = (torch.nn.functional.normalize(row, dim=-1).requires_grad_() for row in rows)
    nothing = torch.zeros(0)
    loss, metrics = objective(None, batch_with_duplicates(), Features(nothing, nothing, None, image_BE, text_BE))
    return metrics, list(torch.autograd.grad(weight * loss, [image_BE, text_BE, objective.log_logit_scale]))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3, NUM_PAIRS, 100])
def test_chunks_of_rows_change_neither_loss_nor_metrics_nor_gradients(chunk_rows: int, is_masked: bool):
    """The temperature is a float32 parameter, and so is its gradient; it is compared in float64 below."""
    metrics, (*of_rows, of_scale) = run(0, is_masked=is_masked, weight=3.0)
    chunked_metrics, (*chunked, of_scale_chunked) = run(chunk_rows, is_masked=is_masked, weight=3.0)
    torch.testing.assert_close(chunked_metrics, metrics, **TOLERANCE)
    torch.testing.assert_close(chunked, of_rows, **TOLERANCE)
    torch.testing.assert_close(of_scale_chunked, of_scale)


def test_the_duplicates_matter_here():
    assert not torch.isclose(run(3, is_masked=False)[0]["loss"], run(3, is_masked=True)[0]["loss"])


@pytest.mark.parametrize("is_masked", [False, True])
def test_every_gradient_of_the_chunked_loss_is_the_numerical_one(is_masked: bool):
    """The scale's too, in float64."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(NUM_PAIRS, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    name_B2 = torch.tensor([[0, 10], [1, 11], [0, 12], [2, 11], [3, 13], [4, 14], [5, 15]])
    names = (name_B2, name_B2) if is_masked else None
    assert torch.autograd.gradcheck(lambda *args: chunked_info_nce(*args, rows=3, names=names)[0], [*inputs, scale])


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes, gradients included."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.num = max(self.num, item.numel())
        return result


@pytest.mark.parametrize("is_masked", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_rows_against_all_columns(is_masked: bool):
    """The names compared are two a pair."""
    num_rows, num_columns, rows = 40, 50, 2
    row_BE, column_GE = torch.randn(num_rows, 1, requires_grad=True), torch.randn(num_columns, 1, requires_grad=True)
    names = torch.arange(2 * num_rows).view(-1, 2), torch.arange(2 * num_columns).view(-1, 2)
    with LargestTensor() as found:
        loss, _ = chunked_info_nce(row_BE, column_GE, torch.tensor(2.0), rows=rows, names=names if is_masked else None)
        loss.backward()
    assert found.num == (2 if is_masked else 1) * rows * num_columns


def test_a_negative_number_of_rows_is_refused():
    with pytest.raises(ConfigError, match="chunk_rows"):
        parse_config(ContrastiveConfig, {"chunk_rows": -1}, source="tests")
