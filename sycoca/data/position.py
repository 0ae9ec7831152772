"""What loader workers tell the training process, in the only way they can: in their batches' `position`."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sycoca.types import DataError

STAND = ("epoch", "group", "offset", "carried", "place", "sources")
"""What a position says of where its worker stands; the last three only where something is carried, or mixed."""
KEPT = frozenset({"truncated_caption"})
"""Reasons that are counted although the sample is kept."""

_MIN_JUDGED = 100  # samples before the share of dropped ones says anything
_MIN_JUDGED_SHARDS = 20  # the same of shards that could not be fetched


class DropLog:
    """A worker's count of what it drops: by reason since it was last asked, and by shard since it began."""

    def __init__(self, max_bad_share: float):
        self._max_bad_share = max_bad_share
        self._new: Counter[str] = Counter()
        self._new_by_source: Counter[str] = Counter()
        self._by_shard: dict[str, Counter[str]] = {}
        self._num_bad = 0
        self._num_lost = self._num_shards = 0
        self.num_kept = 0

    def add(self, reason: str, shard: str) -> None:
        """Count one sample. Raises DataError, with the worst shard, when too large a share has been dropped."""
        self._new[reason] += 1
        if reason in KEPT:
            return
        self._num_bad += 1
        self._by_shard.setdefault(shard, Counter())[reason] += 1
        num_seen = self._num_bad + self.num_kept
        if num_seen >= _MIN_JUDGED and self._num_bad > self._max_bad_share * num_seen:
            raise DataError(
                f"{self._num_bad} of {num_seen} samples could not be used, more than data.max_bad_share = "
                f"{self._max_bad_share}; {self.describe_worst()}. Repair or remove the file, or raise the limit"
            )

    def judge_shard(self, shard: str, *, is_lost: bool) -> None:
        """Count a shard read to its end, or lost on the way: its samples are not known, so lost shards are judged among shards.

        Raises DataError, with the shard, when too large a share was lost.
        """
        self._num_shards += 1
        self._num_lost += is_lost
        if is_lost and self._num_shards >= _MIN_JUDGED_SHARDS and self._num_lost > self._max_bad_share * self._num_shards:
            raise DataError(
                f"{self._num_lost} of {self._num_shards} shards could not be fetched, more than data.max_bad_share = "
                f"{self._max_bad_share}; the last was {shard}. Look after the server, or raise the limit"
            )

    def keep(self, source: str | None) -> None:
        """Count a usable sample, of one of the data sets where several are mixed."""
        self.num_kept += 1
        if source is not None:
            self._new_by_source[source] += 1

    def take(self) -> dict[str, int]:
        """Counts by reason since the last call."""
        taken = dict(self._new)
        self._new.clear()
        return taken

    def take_sources(self) -> dict[str, int]:
        """Usable samples by data set since the last call; none where nothing is mixed."""
        taken = dict(self._new_by_source)
        self._new_by_source.clear()
        return taken

    @contextmanager
    def told_before(self) -> Iterator[None]:
        """Leave out of `take` what is counted inside: an earlier batch has told it."""
        before = self._new.copy()
        yield
        self._new = before

    def worst(self) -> tuple[str, int] | None:
        """The shard with the most dropped samples, and their number."""
        if not self._by_shard:
            return None
        shard = max(self._by_shard, key=lambda name: self._by_shard[name].total())
        return shard, self._by_shard[shard].total()

    def describe_worst(self) -> str:
        """The worst shard with its counts, for an error message."""
        worst = self.worst()
        if worst is None:
            return "no sample was dropped"
        reasons = ", ".join(f"{number} {reason}" for reason, number in self._by_shard[worst[0]].most_common())
        return f"worst file: {worst[0]} ({reasons})"


class DropCounter:
    """Sums over a run what the batches say was dropped on this rank."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.by_source: Counter[str] = Counter()
        self._worst: dict[int, tuple[str, int]] = {}

    def add(self, position: dict[str, Any]) -> None:
        """Note the position of a batch that was used."""
        self.counts.update(position["num_dropped"])
        self.by_source.update(position.get("num_by_source", {}))
        if position["worst"] is not None:
            self._worst[position["worker"]] = position["worst"]

    def source_shares(self) -> dict[str, float]:
        """`source/<name>`: the share of each data set in the samples that were used; nothing where none are mixed."""
        return {f"source/{name}": number / self.by_source.total() for name, number in self.by_source.items()}

    def total(self) -> int:
        """Samples dropped; those with a shortened caption were kept."""
        return sum(number for reason, number in self.counts.items() if reason not in KEPT)

    def line(self) -> str:
        """For the log: counts by reason, and the shard that lost most."""
        if not self.counts:
            return "no samples dropped"
        reasons = ", ".join(f"{reason} {number}" for reason, number in self.counts.most_common())
        worst = max(self._worst.values(), key=lambda pair: pair[1], default=None)
        return f"dropped {self.total()} samples ({reasons})" + (f", worst file {worst[0]} ({worst[1]})" if worst else "")


class PositionTracker:
    """Where this rank's loader stands, by the batches that were used; batches made ahead do not count.

    `resume` is an earlier `state()`, or what `elastic.load_positions` made of those of other processes, to go on from.
    """

    def __init__(self, resume: dict[str, Any] | None = None):
        self._state: dict[str, Any] = resume or {"order": None, "next_worker": 0, "workers": {}}

    def update(self, position: dict[str, Any]) -> None:
        """Note the position of a batch that was used."""
        before = self._state
        is_same = before["order"] in (None, position["order"])
        carried = before.get("carried") if is_same else before["collected"]["walks"]
        workers = before["workers"] if is_same else {}
        stand = {name: position[name] for name in STAND if name in position}
        self._state = {
            "order": position["order"],
            "next_worker": (position["worker"] + 1) % position["num_workers"],
            "workers": {**workers, str(position["worker"]): stand},
            "topology": position["topology"],
            **({"carried": carried} if carried is not None else {}),
        }

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint of this rank."""
        return self._state
