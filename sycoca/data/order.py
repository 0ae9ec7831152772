"""The order of samples: which worker reads what, and how it is mixed. Pure functions of their arguments."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from random import Random
from typing import NamedTuple, TypeVar

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
