"""One stream's endless walk through the shards of one data set."""

from collections.abc import Iterator
from itertools import islice
from random import Random

import numpy as np

from sycoca.data.cache import Access
from sycoca.data.elastic import Carried, Layout, Stand, Unit, walk_units
from sycoca.data.order import Part, deal_shards, every_nth, interleave, shuffle
from sycoca.data.position import DropLog
from sycoca.data.shards import RawSample, read_samples
from sycoca.data.stream import MAX_EMPTY_EPOCHS
from sycoca.types import DataError


class ShardWalk:
    """The raw samples of shards, mixed: epoch after epoch for any stream of any topology."""

    def __init__(self, shards: np.ndarray, *, seed: str, shuffle_buffer: int, shards_per_group: int, max_bytes: int):
        self.shards = shards
        self.layout = Layout("shards", len(shards), shards_per_group)
        self._seed, self._shuffle_buffer, self._max_bytes = seed, shuffle_buffer, max_bytes

    def samples(
        self, stream: int, num_streams: int, *, stand: Stand | None, carried: Carried, drops: DropLog, access: Access
    ) -> Iterator[tuple[RawSample, Stand]]:
        """Raw samples without end, each with the stand that follows it. Raises DataError where epochs bring nothing usable."""
        patience = _Patience(len(self.shards), drops)

        def read(unit: Unit) -> Iterator[RawSample]:
            patience.tried.update(part.shard for part in self._parts(unit))
            return self._read(unit, drops, access)

        def end_epoch() -> None:
            if patience.ends():
                raise DataError(
                    f"no usable sample in {patience.num_empty} epochs for loader worker {stream} of all {num_streams}; "
                    f"{drops.describe_worst()}. There must be more samples than loader workers on all ranks "
                    f"({num_streams}): lower data.num_workers, or add data"
                )

        return walk_units(
            carried.of_stream(stream, num_streams), stand, first_epoch=carried.first_epoch,
            units_of=lambda epoch: self.layout.units(epoch, stream, num_streams), read=read, end_epoch=end_epoch,
        )  # fmt: skip

    def _parts(self, unit: Unit) -> list[Part]:
        order = list(range(len(self.shards)))
        Random(f"{self._seed}/{unit.epoch}").shuffle(order)
        size = self.layout.shards_per_group
        return deal_shards(order, unit.stream, unit.num_streams)[unit.group * size : (unit.group + 1) * size]

    def _read(self, unit: Unit, drops: DropLog, access: Access) -> Iterator[RawSample]:
        sources = [
            read_samples(
                str(self.shards[part.shard]),
                drops,
                max_bytes=self._max_bytes,
                is_mine=every_nth(part.start, part.step),
                access=access,
            )
            for part in self._parts(unit)
        ]
        generator = Random(f"{self._seed}/{unit.stream}/{unit.epoch}/{unit.group}")
        raws = shuffle(interleave(sources), buffer_size=self._shuffle_buffer, generator=generator)
        if unit.start:
            with drops.told_before():
                for _ in islice(raws, unit.start):
                    pass
        return islice(raws, 0, None, unit.step)


class _Patience:
    """Ends a walk that finds nothing. Shards are dealt anew every epoch, so each must have been tried before that."""

    def __init__(self, num_shards: int, drops: DropLog):
        self._num_shards, self._drops = num_shards, drops
        self._num_kept = drops.num_kept
        self.num_empty = 0
        self.tried: set[int] = set()

    def ends(self) -> bool:
        """To be asked at the end of each epoch."""
        if self._drops.num_kept > self._num_kept:
            self.num_empty, self._num_kept = 0, self._drops.num_kept
            self.tried.clear()
            return False
        self.num_empty += 1
        return self.num_empty >= MAX_EMPTY_EPOCHS and len(self.tried) == self._num_shards
