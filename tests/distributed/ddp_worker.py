"""What one rank of test_ddp.py does."""

import os
from typing import Any

import torch
from builders import ABLATION_ROWS, EMBED_WIDTH, IC, ITC, Objectives, build_batch, build_task, gradients, take_rows
from torch import Tensor

from sycoca.distributed import any_rank, gather_objects, gather_rows, gather_uneven_rows, mean_over_ranks, rank, world_size
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.engine import build_accelerator, describe_engine, prepare
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.types import Batch, Features

CASES: dict[str, tuple[Objectives, int]] = {
    "itc": ({"itc": ITC}, 1),
    "ic": ({"ic": IC}, 1),
    "tg_mim": ({"itc": ITC, "tg_mim": MaskedImageConfig()}, 1),
    "sycoca": (ABLATION_ROWS["sycoca"], 1),
    "sycoca_in_chunks": (ABLATION_ROWS["sycoca"], 2),
    "mask_tokens": ({"itc": ITC, "tg_mim": MaskedImageConfig(encode="mask_tokens")}, 1),
    "duplicates": ({"itc": ContrastiveConfig(mask_duplicates=True)}, 1),
    "rows_in_chunks": ({"itc": ContrastiveConfig(mask_duplicates=True, chunk_rows=3)}, 2),
}
"""Objectives and number of chunks; attentive masks wherever there are masks."""
NUM_ALL = 8


def whole_batch() -> Batch:
    """Captions 0 and 5 are the same, and images 1 and 6: on different ranks at any world size."""
    batch = build_batch(NUM_ALL)
    batch["token"][5], batch["length"][5] = batch["token"][0], batch["length"][0]
    batch["key"] = ["a", "b#0", "c", "d", "e", "f", "b#1", "g"]
    return batch


def this_ranks_rows() -> Batch:
    size = NUM_ALL // world_size()
    return take_rows(whole_batch(), list(range(rank() * size, (rank() + 1) * size)))


def find_all() -> dict[str, Any]:
    """What one rank finds. Gradients first: they start the process group, without which every rank is alone."""
    found = {name: ddp_gradients(name) for name in CASES}
    contrast = {is_masked: contrast_by_chunk_rows(is_masked) for is_masked in (False, True)}
    return {"gradients": found, "talk": talk(), "contrast": contrast}


def ddp_gradients(case: str) -> dict[str, Any]:
    """Loss and gradients after two steps of the same batch: an unused parameter fails on the second."""
    configs, num_chunks = CASES[case]
    accelerator = build_accelerator(1.0, batch_size=NUM_ALL // world_size_of_launch())
    plain = build_task(configs, num_chunks=num_chunks)
    task, _ = prepare(accelerator, plain, build_optimizer(plain, OptimConfig(lr=0.1, num_steps=2)))
    for _ in range(2):
        task.zero_grad()
        loss, metrics = task(this_ranks_rows())
        accelerator.backward(loss)
    found = gradients(accelerator.unwrap_model(task))
    ranks = gather_objects(found)
    difference = max(float((one[name] - found[name]).abs().max()) for one in ranks for name in found)
    return {"gradients": found, "loss": mean_over_ranks(loss), "difference_between_ranks": difference,
            "engine": describe_engine(accelerator, "fp32", batch_size=NUM_ALL // world_size()),
            "metrics": {name: mean_over_ranks(value) for name, value in metrics.items()}}  # fmt: skip


def contrast_by_chunk_rows(is_masked: bool) -> dict[int, list[dict[str, Tensor]]]:
    """Every rank's loss, metrics and gradients of ITC in float64: the whole matrix (0), and in chunks of so many rows."""
    generator = torch.Generator().manual_seed(4)
    size = NUM_ALL // world_size()
    rows = [torch.randn(NUM_ALL, EMBED_WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    mine = [torch.nn.functional.normalize(row, dim=-1)[rank() * size :][:size] for row in rows]
    nothing, results = torch.zeros(0), {}
    for chunk_rows in (0, 1, 3):
        objective = ContrastiveConfig(chunk_rows=chunk_rows, mask_duplicates=is_masked).build().double()
        image_BE, text_BE = (row.clone().requires_grad_() for row in mine)
        features = Features(nothing, nothing, None, image_BE, text_BE)
        loss, metrics = objective(None, this_ranks_rows(), features)
        inputs = {"image": image_BE, "text": text_BE, "scale": objective.log_logit_scale}
        grads = torch.autograd.grad(loss, list(inputs.values()))
        results[chunk_rows] = gather_objects({**metrics, **dict(zip(inputs, grads, strict=True))})
    return results


def world_size_of_launch() -> int:
    return int(os.environ["WORLD_SIZE"])


def talk() -> dict[str, Any]:
    """What the functions of sycoca.distributed give on this rank; rows of rank r hold the number r."""
    device = torch.device("cpu")
    rows = torch.full((2, 3), float(rank()), requires_grad=True)
    gathered = gather_rows(rows)
    # every rank's loss weighs all rows, rank r by r + 1: each row's gradient is the sum of the weights
    (gathered.sum() * (rank() + 1)).backward()
    uneven: Tensor = torch.full((rank(), 2), float(rank()))
    return {"gathered": gathered.detach(), "gradient": rows.grad, "uneven": gather_uneven_rows(uneven),
            "objects": gather_objects(f"rank {rank()}"),
            "any": [any_rank(rank() == world_size() - 1, device), any_rank(False, device)]}  # fmt: skip
