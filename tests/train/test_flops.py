"""Operations counted from sizes against those that torch counts while the model runs."""

import pytest
import torch
from builders import ABLATION_ROWS, ITC, build_batch, build_task, vision_options
from torch.utils.flop_counter import FlopCounterMode

import sycoca.models.packing as packing
import sycoca.models.vocabulary as vocabulary
from sycoca.models.masking import RelevanceConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.diagnosis.flops import find_counter, forward_flops, peak_tflops
from sycoca.train.task import PretrainTask

ROWS = ABLATION_ROWS | {
    "mask_tokens": {"itc": ITC, "tg_mim": MaskedImageConfig(encode="mask_tokens")},
    "features": {"itc": ITC, "tg_mim": MaskedImageConfig(encode="features", mask_share=0.3)},
}


def counted_by_torch(task: PretrainTask, batch) -> int:
    task.requires_grad_(False)  # or the vocabulary makes its gradients on the way
    with FlopCounterMode(display=False) as counter:
        task(batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("num_rounded", [1, 64], ids=["packed", "padded"])
@pytest.mark.parametrize("row", ROWS)
def test_the_forward_pass_costs_what_torch_counts(row: str, num_rounded: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "ROUND_ROWS_TO", 1)  # the rows that round it up are no work of the model's
    monkeypatch.setattr(packing, "ROUND_ROWS_TO", num_rounded)
    task, batch = build_task(ROWS[row]), build_batch()
    assert forward_flops(task, batch) == pytest.approx(counted_by_torch(task, batch), rel=1e-12)


OTHERS = [{"pool": "mean"}, {"pool": "attention"}, {"pool": "cls"}, {"vision": vision_options(depth=3)}]


@pytest.mark.parametrize("changes", OTHERS, ids=["mean", "attention", "cls", "depth"])
def test_other_pools_and_depths_are_counted(changes: dict):
    task, batch = build_task({"itc": ITC}, **changes), build_batch()
    assert forward_flops(task, batch) == counted_by_torch(task, batch)


@pytest.mark.parametrize("words", ["tokens", "both"])
def test_relevance_is_counted_in_every_form(words, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "ROUND_ROWS_TO", 1)
    task, batch = build_task(ABLATION_ROWS["sycoca"], relevance=RelevanceConfig(words=words)), build_batch()
    assert forward_flops(task, batch) == counted_by_torch(task, batch)


def test_the_count_asks_no_weight_for_its_shape():
    """ZeRO-3 leaves them without one between their uses."""
    task, batch = build_task(ABLATION_ROWS["sycoca"]), build_batch()
    expected = forward_flops(task, batch)
    for parameter in task.parameters():
        parameter.data = torch.empty(0)
    assert forward_flops(task, batch) == expected


def test_training_is_three_forward_passes():
    """Torch's own count of both passes; the vocabulary's custom backward and what needs no gradient make no whole number."""
    task, batch = build_task({"itc": ITC}), build_batch()
    counter = find_counter(task)
    assert counter is not None
    with FlopCounterMode(display=False) as torchs:
        task(batch)[0].backward()
    assert counter(batch) == pytest.approx(torchs.get_total_flops(), rel=0.1)


def test_a_task_that_is_not_known_is_not_guessed():
    assert find_counter(torch.nn.Linear(2, 3)) is None


def test_the_device_is_found_by_the_longest_part_of_its_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3", is_bf16=True) == 989
    assert peak_tflops("NVIDIA H100 PCIe", is_bf16=True) == 756
    assert peak_tflops("NVIDIA A10G", is_bf16=False) == 31.5
    assert peak_tflops("NVIDIA A100-SXM4-80GB", is_bf16=True) == 312
    assert peak_tflops("Some other device", is_bf16=True) is None
