"""The order of samples: which worker reads what, and how it is mixed. Pure functions of their arguments."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


class Part(NamedTuple):
    """Samples `start`, `start + step`, ... of a shard."""

    shard: int
    start: int
    step: int


def deal_shards(order: list[int], worker: int, num_workers: int) -> list[Part]:
    """This worker's parts of an epoch: whole shards as long as they go round, then a share of one of the rest.

    Every sample belongs to exactly one worker, also with fewer shards than workers.
    """
    num_whole = len(order) // num_workers * num_workers
    parts = [Part(shard, 0, 1) for shard in order[worker:num_whole:num_workers]]
    rest = order[num_whole:]
    if rest:
        turn, place = divmod(worker, len(rest))
        parts.append(Part(rest[place], turn, len(range(place, num_workers, len(rest)))))
    return parts


def every_nth(start: int, step: int) -> Callable[[], bool]:
    """A question to ask once for each item: whether it is number `start`, `start + step`, ..."""
    numbers = count()
    return lambda: next(numbers) % step == start


def interleave(sources: Iterable[Iterator[Item]]) -> Iterator[Item]:
    """One item of each source in turn, until all have ended."""
    running = list(sources)
    while running:
        for source in list(running):
            item = list(islice(source, 1))
            if not item:
                running.remove(source)
            yield from item


def shuffle(items: Iterator[Item], *, buffer_size: int, generator: Random) -> Iterator[Item]:
    """The items in another order; at most `buffer_size` are held. Reads ahead no more than it must, and then drains."""
    held = list(islice(items, buffer_size))
    for item in items:
        place = generator.randrange(len(held))
        held[place], item = item, held[place]
        yield item
    generator.shuffle(held)
    while held:
        yield held.pop()


def mix_in_groups(owner_N: NDArray[np.int64], group_size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of N records in which up to `group_size` of one owner stand side by side, in a mixed order of groups.

    Which of an owner's records come together is drawn too. With groups of one it is `generator.permutation(N)`.
    """
    mixed_N = generator.permutation(len(owner_N))
    if group_size == 1:
        return mixed_N
    by_owner_N = mixed_N[np.argsort(owner_N[mixed_N], kind="stable")]
    place_N = np.arange(len(owner_N))
    is_first_N = np.diff(owner_N[by_owner_N], prepend=-1) != 0
    turn_N = place_N - np.maximum.accumulate(np.where(is_first_N, place_N, 0))
    group_N = np.cumsum(turn_N % group_size == 0) - 1
    turn_of_group = generator.permutation(group_N[-1] + 1)
    return by_owner_N[np.argsort(turn_of_group[group_N], kind="stable")]


def deal_runs(order_N: NDArray[np.int64], num_streams: int) -> NDArray[np.int64]:
    """Another order, of which places s, s + n, s + 2n, ... are a run of neighbours in this one, for each stream s of n."""
    dealt_N = np.empty_like(order_N)
    for stream, run in enumerate(np.array_split(order_N, num_streams)):
        dealt_N[stream::num_streams] = run
    return dealt_N
