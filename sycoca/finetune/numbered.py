"""Endless batches of what is read by number, captions or images: resumed at once, the same for any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random
from typing import Any, NamedTuple

import numpy as np

from sycoca.data.stream import fingerprint
from sycoca.types import CheckpointError, DataError

Collate = Callable[[Sequence[int], Sequence[Random]], dict[str, Any]]
"""Numbers, and for each a generator of what is drawn for it, to a batch."""


class Order(NamedTuple):
    """What decides which numbers follow each other on this rank."""

    seed: int
    batch_size: int
    rank: int
    world_size: int


class NumberedBatches:
    """This rank's batches; an epoch is a permutation by (seed, epoch), what is drawn depends on (seed, epoch, key).

    `resume` is what `PositionTracker.state()` gave on this rank. Raises CheckpointError for a `resume` of another order,
    DataError where there are fewer keys than processes.
    """

    def __init__(self, keys: Sequence[str], collate: Collate, order: Order, *, resume: Any):
        self._keys, self._collate, self._plan = keys, collate, order
        self.order = fingerprint((order.seed, order.rank, order.world_size, order.batch_size, list(keys)))
        self._resume = resume or {"order": self.order, "workers": {}}
        if self._resume["order"] not in (None, self.order):
            raise CheckpointError(
                "the checkpoint's place in the data belongs to another order: expected the same seed, batch size, number of "
                "processes and data as when it was saved; restore them, or start another run.folder"
            )
        if len(keys) < order.world_size:
            raise DataError(f"{len(keys)} rows of data are too few for {order.world_size} processes")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        indices: list[int] = []
        generators: list[Random] = []
        for index, epoch, offset in self._walk():
            indices.append(index)
            generators.append(Random(f"{self._plan.seed}/{epoch}/{self._keys[index]}"))
            if len(indices) == self._plan.batch_size:
                yield {**self._collate(indices, generators), "position": self._position(epoch, offset)}
                indices, generators = [], []

    def _walk(self) -> Iterator[tuple[int, int, int]]:
        """Numbers without end, each with the epoch and how many of it have been used then."""
        start = self._resume["workers"].get("0", {"epoch": 0, "offset": 0})
        num_done = start["offset"]
        for epoch in count(start["epoch"]):
            order_N = np.random.default_rng((self._plan.seed, epoch)).permutation(len(self._keys))
            own_N = order_N[self._plan.rank :: self._plan.world_size]
            for offset, index in enumerate(own_N[num_done:], num_done + 1):
                yield int(index), epoch, offset
            num_done = 0

    def _position(self, epoch: int, offset: int) -> dict[str, Any]:
        stands = {"epoch": epoch, "group": 0, "offset": offset}
        place = {"worker": 0, "num_workers": 1, "order": self.order, "topology": None, **stands}
        return {**place, "num_dropped": {}, "worst": None}
