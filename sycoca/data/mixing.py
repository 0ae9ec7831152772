"""Several data sets in one stream: at every place one of them is drawn by weight, from (seed, stream, place) alone."""

from collections.abc import Iterator, Sequence
from itertools import count
from random import Random
from typing import TypeVar

from pydantic import Field, PositiveFloat

from sycoca.config import Config
from sycoca.data.decode import CaptionConfig
from sycoca.data.elastic import Stand

Item = TypeVar("Item")


class SourceConfig(Config):
    """One of several data sets that are mixed."""

    shards: list[str] = Field(min_length=1)
    """As `data.shards`."""
    weight: PositiveFloat = 1.0
    """How often it is drawn, against the others' weights; a small data set with a large weight is repeated sooner."""
    captions: CaptionConfig | None = None
    """As `data.captions`, which holds where there is none."""
    name: str | None = None
    """Names its share in the log; its number otherwise."""


def mix(
    walks: Sequence[Iterator[tuple[Item, Stand]]], weights: Sequence[float], *, seed: str, start: Stand
) -> Iterator[tuple[tuple[int, Item], Stand]]:
    """Number of a data set and its next sample, without end, each with the stand that follows it.

    `start` is such a stand, or `{"place": n}` to begin all data sets at that place of the mix.
    """
    stands: list[Stand | None] = list(start.get("sources", [None] * len(walks)))
    for place in count(start["place"]):
        number = draw_source(weights, seed=seed, place=place)
        item, stand = next(walks[number])
        stands[number] = stand
        yield (number, item), {**stand, "place": place + 1, "sources": list(stands)}


def draw_source(weights: Sequence[float], *, seed: str, place: int) -> int:
    """The number of the data set at a place of the mix."""
    return Random(f"{seed}/mix/{place}").choices(range(len(weights)), weights)[0]
