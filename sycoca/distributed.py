"""Talking between ranks; the only import of torch.distributed. One process takes the same path and pays nothing.

Every function that takes part in a collective must be called by all ranks, in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_distributed() -> bool:
    """Whether a process group is running; with one process there may be none."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def gather_rows(rows_BE: Tensor) -> Tensor:
    """GE: the rows of all ranks in rank order, with the gradient flowing back to the rank that each row came from.

    Every rank must bring the same number of rows. The backward pass sums what all ranks' losses say of a row, so a
    loss over this rank's rows, averaged over ranks by DDP, has the one-process gradient (design: a gather without
    gradient halves it at two ranks).
    """
    if world_size() == 1:
        return rows_BE
    return _GatherRows.apply(rows_BE)  # pyright: ignore[reportReturnType]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient; a new tensor."""
    total = value.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over ranks, without gradient; a new tensor."""
    return sum_over_ranks(value) / world_size()


def gather_objects(item: Any) -> list[Any]:
    """Every rank's item in rank order, on every rank. Pickles: for small things between our own processes only."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())


class FlagExchange:
    """Flags that all ranks learn of together: `receive` says of each whether any rank had raised it at the last `send`.

    Nobody waits: the sum over ranks runs while the next step is under way. Every rank must call both in turn.
    """

    def __init__(self, num_flags: int, device: torch.device):
        self._device = device
        self._counts = torch.zeros(num_flags)
        self._is_there: Any = None
        """On a GPU, the event after which the counts have come."""

    def send(self, flags: Sequence[bool]) -> None:
        """Tell the other ranks."""
        counts = sum_over_ranks(torch.tensor([float(flag) for flag in flags], device=self._device))
        self._counts = counts.to("cpu", non_blocking=True)
        if self._device.type == "cuda":
            self._is_there = torch.cuda.current_stream(self._device).record_event()

    def receive(self) -> list[bool]:
        """What was sent last; nothing was raised before the first time."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return [count > 0 for count in self._counts.tolist()]


def gather_uneven_rows(rows_NE: Tensor) -> Tensor:
    """The rows of all ranks in rank order, without gradient; ranks may bring different numbers of rows, and none.

    Every rank's rows have the same width and type, also where there are none of them.
    """
    if world_size() == 1:
        return rows_NE.detach()
    counts = gather_objects(rows_NE.shape[0])
    padded_NE = rows_NE.new_zeros((max(counts), *rows_NE.shape[1:]))
    padded_NE[: rows_NE.shape[0]] = rows_NE.detach()
    gathered = [torch.empty_like(padded_NE) for _ in counts]
    dist.all_gather(gathered, padded_NE)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def whole(value: Tensor) -> Tensor:
    """A tensor itself; one that FSDP2 splits, put together: every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor itself; where `like` is split over ranks, this rank's share of it. No communication."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_on_rank_0(tree: Any) -> Any:
    """Nested dictionaries with every split tensor put together, on the CPU of rank 0; other ranks keep nothing of those."""
    if isinstance(tree, dict):
        return {key: whole_on_rank_0(value) for key, value in tree.items()}
    if not isinstance(tree, DTensor):
        return tree
    value = tree.full_tensor()
    return value.cpu() if rank() == 0 else None


def is_whole(module: nn.Module) -> bool:
    """Whether this rank holds all of a module's weights; under ZeRO-3 and FSDP2 it does not."""
    parameters = list(module.parameters())
    return not any(isinstance(parameter, DTensor) or parameter.numel() == 0 for parameter in parameters)  # ZeRO-3 empties them


@torch.no_grad()
def copy_whole(module: nn.Module, into: nn.Module) -> None:
    """Copy a split module's weights and buffers, put together, into one of the same shape. Every rank must call it."""
    pairs = list(zip(chain(into.parameters(), into.buffers()), chain(module.parameters(), module.buffers()), strict=True))
    if any(isinstance(shared, DTensor) for _, shared in pairs):
        for own, shared in pairs:
            own.copy_(whole(shared))
        return
    from deepspeed.runtime.zero import GatheredParameters  # slow to import, and other runs do without

    for own, shared in pairs:
        with GatheredParameters([shared]):
            own.copy_(shared)


@contextmanager
def root_gathered(module: nn.Module) -> Iterator[None]:
    """Meanwhile every rank holds the weights that FSDP2 splits outside of blocks, so that parts can be called by themselves.

    Blocks gather their own at every call: all ranks must make the same calls in the same order.
    """
    assert isinstance(module, FSDPModule), "the root of FSDP2"
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
