"""Loaders over records that are read by number: an infinite training stream that resumes at once, and an evaluation pass.

An epoch is a permutation of all records by (seed, epoch). Rank r of n takes places r, r + n, ... of it, and its loader
workers take turns at those, so a position is (epoch, offset): resuming reads nothing again. Crops and texts are drawn from
(seed, epoch, key). Bad images are dropped and counted as in data/pipeline.py.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator
from random import Random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from sycoca.data.collate import LabelledSample, collate_labelled
from sycoca.data.decode import SampleError, decode_image
from sycoca.data.elastic import Layout, Stand, Unit, walk_units
from sycoca.data.order import deal_runs, mix_in_groups
from sycoca.data.position import DropLog
from sycoca.data.stream import (
    MAX_EMPTY_EPOCHS,
    LoaderConfig,
    TrainStream,
    batch_once,
    build_loader,
    collate_texts,
    fingerprint,
    loader_worker,
)
from sycoca.data.tokenizer import Tokenizer
from sycoca.data.transforms import Pixels, eval_pixels, train_pixels
from sycoca.types import DataError


class Records(Protocol):
    """Labelled images, by number. Held by every loader worker: arrays, not lists (they share memory)."""

    image_N: NDArray[np.int64]
    """The number of each record's image: records that are about one image have the same."""
    group_size: int
    """In training, up to so many records about one image come one after the other, with one crop of it."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Unique, and the same wherever the data lies: what is drawn at random is drawn from it."""
        ...

    def image_name(self, index: int) -> str:
        """Where a user finds the image, for messages."""
        ...

    def image(self, index: int) -> bytes:
        """The image's file."""
        ...

    def text(self, index: int, generator: Random) -> str:
        """The text that goes with the image, maybe none."""
        ...

    def target(self, index: int) -> int | NDArray[np.float32]:
        """A class's place, or a share in [0, 1] of each answer."""
        ...


class IndexedConfig(LoaderConfig):
    """How records become batches."""


def build_indexed_train_loader(
    records: Records,
    config: IndexedConfig,
    *,
    tokenizer: Tokenizer,
    seed: int,
    rank: int,
    world_size: int,
    resume: dict[str, Any] | None = None,
) -> DataLoader:
    """An infinite stream of full batches: `sycoca.types.Batch` with `target` (B int64, or float32 B x answers).

    `image` has one row for records about one image that follow each other, and `image_row` (B int64) says each sample's.
    `resume` is what `PositionTracker.state()` gave on this rank: the next batch is then the one that followed.
    Raises DataError for fewer records than loader workers on all ranks, CheckpointError for a `resume` of another order.
    """
    stream = _TrainStream(records, config, tokenizer=tokenizer, seed=seed, rank=rank, world_size=world_size)
    if resume is not None:
        stream.resume(resume)
    return build_loader(stream, config.num_workers)


def build_indexed_eval_loader(
    records: Records, config: IndexedConfig, *, tokenizer: Tokenizer, rank: int, world_size: int, batch_size: int
) -> DataLoader:
    """Each record once: rank r of n takes records r, r + n, ... in order. Batches at the end may be short, a rank may get none.

    Yields `image` (NCHW float32), `token`, `length`, `key`, `target`, `image_row` and `num_dropped` by reason: an image that
    cannot be read gives no row. Records about one image share its row where they follow each other.
    """
    stream = _EvalStream(records, config, tokenizer=tokenizer, rank=rank, world_size=world_size, batch_size=batch_size)
    return build_loader(stream, config.num_workers)


class _TrainStream(TrainStream[IndexedConfig]):
    order_settings = "and the same records"

    def __init__(
        self, records: Records, config: IndexedConfig, *, tokenizer: Tokenizer, seed: int, rank: int, world_size: int
    ):
        super().__init__(config, tokenizer, seed=seed, rank=rank, world_size=world_size)
        if len(records) < self._num_streams:
            raise DataError(
                f"{len(records)} records are too few for {self._num_streams} loader workers on all ranks; "
                "lower data.num_workers, or add data"
            )
        self._records = records
        self._pixels = _Pixels(records, config, draft_size=self._draft_size)
        facts = (len(records), _digest_keys(records), *([records.group_size] if records.group_size > 1 else []))
        self._order = fingerprint((seed, rank, self._num_workers, self._num_streams, *facts))
        self._data = fingerprint((seed, *facts))

    @property
    def order(self) -> str:
        return self._order

    @property
    def data(self) -> str:
        return self._data

    @property
    def layouts(self) -> list[Layout]:
        return [Layout("records")]

    def _walk(self, worker: int, drops: DropLog) -> Iterator[tuple[int, Stand]]:
        """Numbers of records without end, each with the stand that follows it."""
        layout, carried = Layout("records"), self.carried()
        stream = layout.stream(self._rank, worker, world_size=self._world_size, num_workers=self._num_workers)
        kept_at_ends = [drops.num_kept]

        def end_epoch() -> None:
            kept_at_ends.append(drops.num_kept)
            if kept_at_ends[-MAX_EMPTY_EPOCHS - 1 :] == [drops.num_kept] * (MAX_EMPTY_EPOCHS + 1):
                raise DataError(
                    f"no usable image in {MAX_EMPTY_EPOCHS} epochs for loader worker {worker} of rank {self._rank}; "
                    f"{drops.describe_worst()}"
                )

        return walk_units(
            carried.of_stream(stream, self._num_streams), self._starts.get(str(worker)), first_epoch=carried.first_epoch,
            units_of=lambda epoch: layout.units(epoch, stream, self._num_streams), read=self._read, end_epoch=end_epoch,
        )  # fmt: skip

    def _read(self, unit: Unit) -> Iterator[int]:
        generator = np.random.default_rng((self._seed, unit.epoch))
        order_N = mix_in_groups(self._records.image_N, self._records.group_size, generator)
        if self._records.group_size > 1:
            order_N = deal_runs(order_N, unit.num_streams)
        return map(int, order_N[unit.start :: unit.step])

    def _decode(self, item: int, epoch: int, drops: DropLog) -> LabelledSample | None:
        records, config = self._records, self._config
        key = records.key(item)
        generator = Random(f"{self._seed}/{epoch}/{key}")
        token = self._tokenizer.encode(records.text(item, generator), config.max_tokens + 1)  # one more shows what will be cut
        number = item
        if records.group_size > 1:  # one crop for all that is asked about an image
            number, generator = int(records.image_N[item]), Random(f"{self._seed}/{epoch}/{records.image_name(item)}")
        pixel_HWC = self._pixels.read(
            item, (epoch, number), drops, lambda image: train_pixels(image, config.transform, generator=generator)
        )
        if pixel_HWC is None:
            return None
        token = self._shorten(token, records.image_name(item), drops)
        return LabelledSample(key, pixel_HWC, token, records.target(item))

    def _collate(self, samples: list[LabelledSample]) -> dict[str, Any]:
        return collate_texts(samples, self._config, self._tokenizer, collate_labelled)


class _EvalStream(IterableDataset[dict[str, Any]]):
    def __init__(
        self, records: Records, config: IndexedConfig, *, tokenizer: Tokenizer, rank: int, world_size: int, batch_size: int
    ):
        self._records = records
        self._config = config
        self._tokenizer = tokenizer
        self._rank = rank
        self._world_size = world_size
        self._batch_size = batch_size
        self._pixels = _Pixels(records, config)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        drops = DropLog(self._config.max_bad_share)
        return batch_once(self._samples(drops), self._collate, batch_size=self._batch_size, drops=drops)

    def _samples(self, drops: DropLog) -> Iterator[LabelledSample]:
        start = self._rank + self._world_size * loader_worker()
        for index in range(start, len(self._records), self._world_size * max(1, self._config.num_workers)):
            sample = self._decode(index, drops)
            if sample is not None:
                yield sample

    def _decode(self, index: int, drops: DropLog) -> LabelledSample | None:
        records, config = self._records, self._config
        key = records.key(index)
        token = self._tokenizer.encode(records.text(index, Random(key)), config.max_tokens)
        number = int(records.image_N[index])
        pixel_HWC = self._pixels.read(index, number, drops, lambda image: eval_pixels(image, config.transform))
        if pixel_HWC is None:
            return None
        return LabelledSample(key, pixel_HWC, token, records.target(index))

    def _collate(self, samples: list[LabelledSample]) -> dict[str, Any]:
        return collate_texts(samples, self._config, self._tokenizer, collate_labelled)


class _Pixels:
    """Reads images, and keeps what was made of the one before: the records about one follow each other, and share the array."""

    def __init__(self, records: Records, config: IndexedConfig, *, draft_size: int = 0):
        self._records, self._config, self._draft_size = records, config, draft_size
        self._name: Hashable = None
        self._pixel_HWC: Pixels | None = None

    def read(self, index: int, name: Hashable, drops: DropLog, make: Callable[[Image.Image], Pixels]) -> Pixels | None:
        """What `make` gives for the record's image, the same array as long as `name` is; None where the image was dropped.

        The record is counted either way, a dropped one under its image's name.
        """
        if name != self._name:
            config = self._config
            try:
                image = decode_image(
                    self._records.image(index), max_pixels=config.max_pixels, max_bytes=config.max_bytes,
                    draft_size=self._draft_size,
                )  # fmt: skip
            except SampleError as error:
                drops.add(error.reason, self._records.image_name(index))
                return None
            self._name, self._pixel_HWC = name, make(image)
        drops.num_kept += 1
        return self._pixel_HWC


def _digest_keys(records: Records) -> str:
    digest = hashlib.sha256()
    for index in range(len(records)):
        digest.update(records.key(index).encode() + b"\n")
    return digest.hexdigest()
