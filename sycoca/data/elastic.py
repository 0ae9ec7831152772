"""Going on with another number of processes or loader workers: what an epoch still owes is collected and dealt anew.

An epoch of a data set is made of units, each read by one stream (a loader worker of a rank) in an order that only depends on
the unit. A stream's stand says how far it came. When the streams are others than before, what the old ones had left of every
epoch that any of them had begun is dealt to the new ones as carried units; then the new topology's ordinary epochs follow.
Nothing is read twice or left out, and a unit that several streams share is strided, so it may be carried any number of times.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from sycoca.data.order import Part, deal_shards

Item = TypeVar("Item")
Stand = dict[str, Any]


class Unit(NamedTuple):
    """Samples `start`, `start + step`, ... of a group of an epoch, as stream `stream` of `num_streams` mixes it.

    Records' epochs are one group, which all `num_streams` share; `stream` is 0.
    """

    epoch: int
    stream: int
    num_streams: int
    group: int
    start: int
    step: int

    def advance(self, num_done: int) -> "Unit":
        """What is left after `num_done` samples."""
        return self._replace(start=self.start + num_done * self.step)

    def share(self, part: Part) -> "Unit":
        """Every `part.step`-th of its samples."""
        return self._replace(start=self.start + part.start * self.step, step=self.step * part.step)


class Layout(NamedTuple):
    """What divides a data set's epochs into units: groups of shards, or records by number (whose epoch is one group)."""

    kind: Literal["shards", "records"]
    num_shards: int = 0
    shards_per_group: int = 1

    def stream(self, rank: int, worker: int, *, world_size: int, num_workers: int) -> int:
        """The number of a loader worker's stream among all ranks'."""
        return rank * num_workers + worker if self.kind == "shards" else rank + world_size * worker

    def units(self, epoch: int, stream: int, num_streams: int) -> list[Unit]:
        """A stream's units of an epoch, in the order of their groups."""
        if self.kind == "records":
            return [Unit(epoch, 0, num_streams, 0, stream, num_streams)]
        num_parts = len(deal_shards(list(range(self.num_shards)), stream, num_streams))
        return [Unit(epoch, stream, num_streams, group, 0, 1) for group in range(-(-num_parts // self.shards_per_group))]


class Carried(NamedTuple):
    """What all streams together read before the first ordinary epoch."""

    first_epoch: int
    units: list[Unit]

    @classmethod
    def parse(cls, tree: list[Any] | None) -> "Carried":
        """From JSON; nothing is carried where there is none."""
        return cls(0, []) if tree is None else cls(tree[0], [Unit(*unit) for unit in tree[1]])

    def of_stream(self, stream: int, num_streams: int) -> list[Unit]:
        """Whole units as long as they go round, then a share of one of the rest."""
        parts = deal_shards(list(range(len(self.units))), stream, num_streams)
        return [self.units[part.shard].share(part) for part in parts]


def walk_units(
    own: list[Unit], stand: Stand | None, *, first_epoch: int, units_of: Callable[[int], list[Unit]],
    read: Callable[[Unit], Iterator[Item]], end_epoch: Callable[[], None],
) -> Iterator[tuple[Item, Stand]]:  # fmt: skip
    """A stream's samples without end, each with the stand that follows it: its carried units, then epoch after epoch."""
    num_carried, num_done = (stand.get("carried", 0), stand["offset"]) if stand else (0, 0)
    for number in range(num_carried, len(own)):
        unit = own[number]
        for offset, item in enumerate(read(unit.advance(num_done)), num_done + 1):
            yield item, {"epoch": unit.epoch, "group": unit.group, "offset": offset, "carried": number}
        num_done, stand = 0, None
    is_carried = {"carried": len(own)} if own else {}
    start, group = (stand["epoch"], stand["group"]) if stand else (first_epoch, 0)
    for epoch in count(start):
        for unit in units_of(epoch)[group:]:
            for offset, item in enumerate(read(unit.advance(num_done)), num_done + 1):
                yield item, {"epoch": epoch, "group": unit.group, "offset": offset, **is_carried}
            num_done = 0
        group = num_done = 0
        end_epoch()


def collect(ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """From the saved positions of all ranks: what is left of the epochs begun, as plain data. None where they do not say it.

    `data` tells the data and their order from others, whatever the topology; `batch_size` is that of one rank.
    """
    facts = [state.get("topology") for state in ranks]
    topology = facts[0]
    if topology is None or None in facts or topology["world_size"] != len(ranks):
        return None
    places = [stand.get("place", 0) for state in ranks for stand in state["workers"].values()]
    return {
        "data": topology["data"],
        "world_size": topology["world_size"],
        "batch_size": topology["batch_size"],
        "place": max(places, default=0),
        "walks": [_collect_walk(ranks, topology, number) for number in range(len(topology["layouts"]))],
    }


def _collect_walk(ranks: list[dict[str, Any]], topology: dict[str, Any], number: int) -> Carried:
    layout = Layout(*topology["layouts"][number])
    world_size, num_workers = topology["world_size"], topology["num_workers"]
    num_streams = world_size * num_workers
    carried = Carried.parse(ranks[0]["carried"][number] if ranks[0].get("carried") else None)
    left: list[Unit] = []
    ordinary: list[tuple[int, int, int, int]] = []
    for rank, state in enumerate(ranks):
        for worker in range(num_workers):
            stream = layout.stream(rank, worker, world_size=world_size, num_workers=num_workers)
            stand = _stand_of(state["workers"].get(str(worker)), number)
            own = carried.of_stream(stream, num_streams)
            num_carried = stand.get("carried", 0) if stand else 0
            if num_carried < len(own):
                left += [own[num_carried].advance(stand["offset"] if stand else 0), *own[num_carried + 1 :]]
                stand = None
            epoch, group, num_done = (stand["epoch"], stand["group"], stand["offset"]) if stand else (carried.first_epoch, 0, 0)
            ordinary.append((stream, epoch, group, num_done))
    # a stream at (first epoch, 0, 0) has not begun it
    last = max(epoch if (group, done) != (0, 0) else epoch - 1 for _, epoch, group, done in ordinary)
    for stream, epoch, group, num_done in ordinary:
        for later in range(epoch, last + 1):
            units = layout.units(later, stream, num_streams)[group:]
            left += [units[0].advance(num_done), *units[1:]] if units else []
            group = num_done = 0
    return Carried(last + 1, sorted(left, key=lambda unit: unit.epoch))


def _stand_of(stands: Stand | None, number: int) -> Stand | None:
    """A worker's stand in one of the data sets it mixes, or in its only one."""
    return stands["sources"][number] if stands and "sources" in stands else stands


def load_positions(folder: Path, rank: int, *, was_world_size: int, world_size: int) -> dict[str, Any] | None:
    """What to go on from, of the `rank_N.json` that every rank wrote: this rank's own, and what all together had left.

    None where this rank's own is missing, or, with another number of processes, where the files do not say what was left.
    """
    paths = [folder / f"rank_{number}.json" for number in range(was_world_size)]
    ranks = [json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None for path in paths]
    known = [state for state in ranks if state is not None]
    collected = collect(known) if len(known) == was_world_size else None
    if was_world_size == world_size:  # its own place is enough where each machine keeps only its own files
        own = ranks[rank]
        return None if own is None else {**own, "collected": collected}
    if collected is None:
        return None
    return {"order": "of other processes", "next_worker": 0, "workers": {}, "collected": collected}
