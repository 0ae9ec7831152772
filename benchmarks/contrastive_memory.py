"""Peak memory and time of the contrastive loss against the global batch: whole matrix of similarities, and in chunks of rows.

    python benchmarks/contrastive_memory.py [--ranks 64] [--width 256] [--chunk-rows 128] [--largest 16] [--device cpu|cuda]

One process stands for one of `--ranks`: it holds its B = G / ranks rows and the features that a gather would have brought, G of
each kind, and goes through the loss and back to both. G runs over 2^10 ... 2^largest. What is counted are the bytes of all
tensors alive at once that the loss and its backward pass make, the features' gradients among them; what a kernel takes for
itself while it runs is not seen. The time is the median of `--rounds` passes without counting. Both sides' losses are compared.
The table goes to standard error; the last line of standard output is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from argparse import Namespace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sycoca.objectives.chunked_contrast import chunked_info_nce
from sycoca.objectives.contrastive import info_nce

SIDES = ("whole", "chunked")
SMALLEST = 10
SCALE = 14.3


def main() -> None:
    args = _parse()
    rows = []
    for power in range(SMALLEST, args.largest + 1):
        found = {side: measure(args, side, 2**power) for side in SIDES}
        whole, chunked = (found[side] for side in SIDES)
        assert abs(whole["loss"] - chunked["loss"]) < 1e-4 * whole["loss"], "both sides compute one loss"
        rows.append({"pairs": 2**power, "rows": 2**power // args.ranks}
                    | {f"{side}_{name}": found[side][name] for name in ("megabytes", "seconds") for side in SIDES})  # fmt: skip
        print(
            f"G 2^{power}  B {2**power // args.ranks:5d}   whole {whole['megabytes']:8.1f} MB {whole['seconds']:7.3f} s   "
            f"chunked {chunked['megabytes']:8.1f} MB {chunked['seconds']:7.3f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    settings = {"ranks": args.ranks, "width": args.width, "chunk_rows": args.chunk_rows, "device": args.device}
    last = rows[-1]
    ratios = {
        f"{short}_ratio": round(last[f"chunked_{name}"] / last[f"whole_{name}"], 3)
        for short, name in (("memory", "megabytes"), ("time", "seconds"))
    }
    print(json.dumps({"benchmark": "contrastive_memory", **settings, **ratios, "batches": rows}), flush=True)


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64, help="simulated processes (default 64)")
    parser.add_argument("--width", type=int, default=256, help="of the shared embedding (default 256)")
    parser.add_argument("--chunk-rows", type=int, default=128, help="objectives.itc.chunk_rows (default 128)")
    parser.add_argument("--largest", type=int, default=16, help="power of two of the largest global batch (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes (default 3)")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


class LiveBytes(TorchDispatchMode):
    """Keeps account of the storages that operations make and that are alive; those of `known` tensors are left out."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def measure(args: Namespace, side: str, num_pairs: int) -> dict[str, float]:
    """Megabytes (2^20 bytes) of the loss and its backward pass, seconds a pass, and the loss."""
    generator = torch.Generator().manual_seed(0)
    gathered = [torch.randn(num_pairs, args.width, generator=generator) for _ in range(2)]
    gathered = [F.normalize(rows, dim=-1).to(args.device).requires_grad_() for rows in gathered]
    own = [rows.detach()[: num_pairs // args.ranks].clone().requires_grad_() for rows in gathered]
    scale = torch.tensor(SCALE, device=args.device, requires_grad=True)
    inputs = [*own, *gathered, scale]

    def one_pass() -> float:
        started = time.perf_counter()
        loss = contrast(side, own, gathered, scale, chunk_rows=args.chunk_rows)
        loss.backward()
        losses.append(loss.item())  # waits for the device
        for tensor in inputs:
            tensor.grad = None
        return time.perf_counter() - started

    losses: list[float] = []
    with LiveBytes(inputs) as counted:
        one_pass()
    seconds = [one_pass() for _ in range(args.rounds)]
    return {"megabytes": round(counted.peak / 2**20, 1), "seconds": round(statistics.median(seconds), 4), "loss": losses[-1]}


def contrast(side: str, own: list[Tensor], gathered: list[Tensor], scale: Tensor, *, chunk_rows: int) -> Tensor:
    """Both directions, as objectives/contrastive.py calls them."""
    (image_BE, text_BE), (image_GE, text_GE) = own, gathered
    if side == "whole":
        return info_nce(scale * image_BE @ text_GE.T, scale * text_BE @ image_GE.T, None)[0]
    pairs = (image_BE, text_GE), (text_BE, image_GE)
    return torch.stack([chunked_info_nce(*pair, scale, rows=chunk_rows, names=None)[0] for pair in pairs]).mean()


if __name__ == "__main__":
    main()
