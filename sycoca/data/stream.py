"""What every loader shares: its settings, full batches that say where they ended, and the loading processes around them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sycoca.config import Config
from sycoca.data.collate import AnySample, collate_pairs, num_columns
from sycoca.data.elastic import Carried, Layout, Stand
from sycoca.data.position import DropLog
from sycoca.data.tokenizer import Tokenizer, TokenizerConfig
from sycoca.data.transforms import TransformConfig, num_pixels_needed
from sycoca.log import logger
from sycoca.types import CheckpointError

MAX_EMPTY_EPOCHS = 3
"""Epochs without one usable sample before a worker gives up."""
_PREFETCHED = 2  # batches a worker makes ahead


class LoaderConfig(Config):
    """How samples become batches."""

    batch_size: int = Field(ge=1)
    """Samples a process and step."""
    max_tokens: int = Field(default=76, ge=3)
    """Longest text in tokens, bos and eos counted."""
    round_to: int = Field(default=8, ge=1)
    """Batches are padded to a multiple of this many tokens."""
    num_workers: int = Field(default=2, ge=0)
    """Loader processes a rank; 0 loads in the training process, in the order of one worker."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    transform: TransformConfig = TransformConfig()
    max_pixels: int = Field(default=50_000_000, ge=1)
    max_bytes: int = Field(default=20_000_000, ge=1)
    max_bad_share: float = Field(default=0.2, ge=0, le=1)
    """Share of dropped samples, of those a worker has seen, that stops the run."""


Settings = TypeVar("Settings", bound=LoaderConfig)
Kept = TypeVar("Kept")


class TrainStream(IterableDataset[dict[str, Any]], Generic[Settings], ABC):
    """Full batches without end, each with the position that follows it; a subclass walks its items and decodes each.

    `order` tells one order of samples from another; `order_settings` names what it depends on besides seed, rank and workers.
    """

    order_settings: ClassVar[str]

    def __init__(self, config: Settings, tokenizer: Tokenizer, *, seed: int, rank: int, world_size: int):
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_workers = max(1, config.num_workers)
        self._num_streams = world_size * self._num_workers
        self._draft_size = num_pixels_needed(config.transform)
        self._first_worker = 0
        self._starts: dict[str, Stand] = {}
        self._first_place = 0
        self._carried: list[Carried] = []

    @property
    @abstractmethod
    def order(self) -> str:
        """The same for the same order of samples on this rank."""

    @property
    @abstractmethod
    def data(self) -> str:
        """The same for the same data, seed and units, whatever the number of processes and workers."""

    @property
    @abstractmethod
    def layouts(self) -> list[Layout]:
        """What divides the epochs of each data set into units."""

    @abstractmethod
    def _walk(self, worker: int, drops: DropLog) -> Iterator[tuple[Any, Stand]]:
        """Items without end, each with the stand that follows it, from `_starts` and what is carried on."""

    @abstractmethod
    def _decode(self, item: Any, epoch: int, drops: DropLog) -> AnySample | None:
        """None where the sample was dropped."""

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what `PositionTracker.state()` gave on this rank, or `elastic.load_positions` found.

        With another number of processes or workers, the rest of the epoch is dealt anew, for as many samples a step as before.
        Raises CheckpointError for other data or another seed, and for another number of samples a step.
        """
        if state["order"] in (None, self.order):
            self._first_worker, self._starts = state["next_worker"], state["workers"]
            carried = state.get("carried") or []
        else:
            carried = self._deal_anew(state.get("collected"))
        self._carried = [Carried.parse(tree) for tree in carried]

    def _deal_anew(self, collected: dict[str, Any] | None) -> list[Any]:
        if collected is None or collected["data"] != self.data:
            raise CheckpointError(
                "the checkpoint's place in the data belongs to another order of samples: expected the same seed, where not all "
                f"ranks' places are known also the same number of processes and workers, {self.order_settings} as when it was "
                "saved; restore them, or start another run.folder from its weights with init.checkpoint"
            )
        self._check_global_batch(collected)
        self._first_place = collected["place"]
        num_units = sum(len(walk[1]) for walk in collected["walks"])
        logger.info("the data goes on with other processes or workers: %d groups of the epoch begun are dealt anew", num_units)
        return collected["walks"]

    def _check_global_batch(self, collected: dict[str, Any]) -> None:
        """With as many processes as before, another batch size is the user's wish; with others, most likely an oversight."""
        size, world_size = collected["batch_size"], collected["world_size"]
        before, now = size * world_size, self._config.batch_size * self._world_size
        if before == now or world_size == self._world_size:
            return
        share, rest = divmod(before, self._world_size)
        advice = f"use a number of processes that divides {before}" if rest else f"set data.batch_size={share}"
        raise CheckpointError(
            f"a step had {size} samples on each of {world_size} processes, {before} in all; with {self._config.batch_size} on "
            f"each of {self._world_size} it would have {now}: {advice}"
        )

    def carried(self, number: int = 0) -> Carried:
        """What is read of a data set before its first ordinary epoch."""
        return self._carried[number] if self._carried else Carried.parse(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = (loader_worker() + self._first_worker) % self._num_workers
        drops = DropLog(self._config.max_bad_share)
        samples: list[AnySample] = []
        for item, stands in self._walk(worker, drops):
            sample = self._decode(item, stands["epoch"], drops)
            if sample is None:
                continue
            samples.append(sample)
            if len(samples) == self._config.batch_size:
                yield {**self._collate(samples), "position": self._position(worker, stands, drops)}
                samples = []

    def _shorten(self, token: list[int], source: str, drops: DropLog) -> list[int]:
        """At most `max_tokens`, counted where something was cut; the text still ends in eos."""
        if len(token) <= self._config.max_tokens:
            return token
        drops.add("truncated_caption", source)
        return [*token[: self._config.max_tokens - 1], self._tokenizer.eos]

    def _collate(self, samples: Sequence[AnySample]) -> dict[str, Any]:
        return collate_texts(samples, self._config, self._tokenizer)

    def _position(self, worker: int, stands: Stand, drops: DropLog) -> dict[str, Any]:
        by_source = drops.take_sources()
        return {
            "worker": worker,
            "num_workers": self._num_workers,
            "order": self.order,
            **stands,
            "num_dropped": drops.take(),
            "worst": drops.worst(),
            "topology": self._topology(),
            **({"num_by_source": by_source} if by_source else {}),
        }

    def _topology(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "world_size": self._world_size,
            "num_workers": self._num_workers,
            "batch_size": self._config.batch_size,
            "layouts": self.layouts,
        }


def collate_texts(
    samples: Sequence[Any], config: LoaderConfig, tokenizer: Tokenizer, collate: Callable[..., dict[str, Any]] = collate_pairs
) -> dict[str, Any]:
    """`Batch` without its position, padded to the longest text of the batch, rounded up. `collate`: data/collate.py."""
    longest = max(len(sample.token) for sample in samples)
    columns = num_columns(longest, round_to=config.round_to, max_tokens=config.max_tokens)
    return collate(samples, config.transform, pad=tokenizer.pad, num_columns=columns)


def batch_once(
    samples: Iterator[Kept], collate: Callable[[list[Kept]], dict[str, Any]], *, batch_size: int, drops: DropLog
) -> Iterator[dict[str, Any]]:
    """The samples in batches, the last one maybe short, with what was dropped on the way as `num_dropped`.

    A full batch waits for the next sample, so that what is dropped at the end is told by the last.
    """
    batch: list[Kept] = []
    for sample in samples:
        if len(batch) == batch_size:
            yield {**collate(batch), "num_dropped": drops.take()}
            batch = []
        batch.append(sample)
    if batch:
        yield {**collate(batch), "num_dropped": drops.take()}


def fingerprint(facts: object) -> str:
    """16 characters that tell one set of facts (plain data) from another."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def loader_worker() -> int:
    """This loading process's number, 0 in the training process."""
    info = get_worker_info()
    return info.id if info is not None else 0


def build_loader(stream: IterableDataset[dict[str, Any]], num_workers: int) -> DataLoader:
    """The stream's own batches, made ahead by `num_workers` processes, which take turns."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the loader must not move the run's random state
    )
