"""The loaders: an infinite training stream that resumes exactly, and a finite evaluation pass.

Order is a function of (seed, epoch, global worker). An epoch's shards are permuted with the shared seed and dealt to the
workers; what is left of an uneven deal is shared sample by sample. A worker reads its shards in groups, through a shuffle
buffer that is empty at each group's end, so a position is (epoch, group, offset) and resuming re-reads one group at most.
Crops and captions are drawn from (seed, epoch, key). What a worker counts travels in its batches: it cannot reach the
parent process in another way.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import count, islice
from random import Random
from typing import Any

import numpy as np
from pydantic import Field
from torch.utils.data import DataLoader, IterableDataset

from sycoca.data.collate import EvalSample, Sample, collate_images
from sycoca.data.decode import CaptionConfig, SampleError, choose_caption, decode_image, list_captions, read_meta
from sycoca.data.order import Part, deal_shards, every_nth, interleave, shuffle
from sycoca.data.position import DropLog
from sycoca.data.shards import RawSample, expand_shards, read_samples
from sycoca.data.stream import MAX_EMPTY_EPOCHS, LoaderConfig, TrainStream, batch_once, build_loader, fingerprint, loader_worker
from sycoca.data.tokenizer import Tokenizer
from sycoca.data.transforms import eval_pixels, train_pixels
from sycoca.types import DataError

_NUM_SPECIAL = 2  # a caption of bos and eos says nothing


class DataConfig(LoaderConfig):
    """Which shards are read, and how samples become batches."""

    shards: list[str]
    """Tar files, folders of them, `{000..123}` ranges or wildcards."""
    shuffle_buffer: int = Field(default=2000, ge=1)
    """Raw samples a worker holds to draw from."""
    shards_per_group: int = Field(default=4, ge=1)
    """Shards a worker reads together; resuming re-reads at most this many."""
    captions: CaptionConfig = CaptionConfig()
    allow_pipe: bool = False
    """Whether `pipe:` shards may run commands."""


def build_train_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rank: int,
    world_size: int,
    resume: dict[str, Any] | None = None,
) -> DataLoader:
    """An infinite stream of full batches (`sycoca.types.Batch`), the workers taking turns.

    `resume` is what `PositionTracker.state()` gave on this rank: the next batch is then the one that followed.
    Raises DataError for shards that cannot be read, CheckpointError for a `resume` of another order.
    """
    stream = _TrainStream(config, tokenizer, seed=seed, rank=rank, world_size=world_size)
    if resume is not None:
        stream.resume(resume)
    return build_loader(stream, config.num_workers)


def build_eval_loader(config: DataConfig, *, rank: int, world_size: int, batch_size: int) -> DataLoader:
    """Each sample once: rank r takes samples r, r + n, ... of the shards in order. Batches at the end may be short.

    Yields `image` (BCHW float32), `key`, `captions` (all of each sample), `meta` (its json) and `num_dropped` by reason.
    """
    return build_loader(_EvalStream(config, rank=rank, world_size=world_size, batch_size=batch_size), config.num_workers)


class _TrainStream(TrainStream[DataConfig]):
    order_settings = "data.shards, data.shuffle_buffer and data.shards_per_group"

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, seed: int, rank: int, world_size: int):
        super().__init__(config, tokenizer, seed=seed, rank=rank, world_size=world_size)
        self._shards = _expand(config)

    @cached_property
    def order(self) -> str:
        """Of shards by file name: a data set may move to another folder."""
        names = [str(name).rsplit("/", 1)[-1] for name in self._shards]
        facts = (self._seed, self._rank, self._num_workers, self._num_streams, self._config.shuffle_buffer)
        return fingerprint((facts, self._config.shards_per_group, names))

    def _walk(self, worker: int, drops: DropLog) -> Iterator[tuple[RawSample, dict[str, int]]]:
        """Raw samples without end, each with the position that follows it."""
        start = self._start(worker)
        first_group, num_done = start["group"], start["offset"]
        num_empty = 0
        for epoch in count(start["epoch"]):
            num_before = drops.num_kept
            for group, parts in self._groups(worker, epoch, first=first_group):
                raws = self._read_group(parts, f"{self._stream_name(worker)}/{epoch}/{group}", drops)
                if num_done:
                    _skip(raws, num_done, drops)
                for offset, raw in enumerate(raws, num_done + 1):
                    yield raw, {"epoch": epoch, "group": group, "offset": offset}
                num_done = 0
            first_group = 0
            num_empty = num_empty + 1 if drops.num_kept == num_before else 0
            if num_empty == MAX_EMPTY_EPOCHS:
                raise DataError(
                    f"no usable sample in {num_empty} epochs for loader worker {worker} of rank {self._rank}; "
                    f"{drops.describe_worst()}. There must be more samples than loader workers on all ranks "
                    f"({self._num_streams}): lower data.num_workers, or add data"
                )

    def _stream_name(self, worker: int) -> str:
        return f"{self._seed}/{self._rank * self._num_workers + worker}"

    def _groups(self, worker: int, epoch: int, *, first: int) -> Iterator[tuple[int, list[Part]]]:
        order = list(range(len(self._shards)))
        Random(f"{self._seed}/{epoch}").shuffle(order)
        parts = deal_shards(order, self._rank * self._num_workers + worker, self._num_streams)
        size = self._config.shards_per_group
        for group in range(first, -(-len(parts) // size)):
            yield group, parts[group * size : (group + 1) * size]

    def _read_group(self, parts: list[Part], name: str, drops: DropLog) -> Iterator[RawSample]:
        sources = [
            read_samples(
                str(self._shards[part.shard]),
                drops,
                max_bytes=self._config.max_bytes,
                is_mine=every_nth(part.start, part.step),
            )
            for part in parts
        ]
        return shuffle(interleave(sources), buffer_size=self._config.shuffle_buffer, generator=Random(name))

    def _decode(self, raw: RawSample, epoch: int, drops: DropLog) -> Sample | None:
        """Text first: it fails cheaply. None where the sample was dropped."""
        config = self._config
        generator = Random(f"{self._seed}/{epoch}/{raw.key}")
        try:
            token = self._encode(choose_caption(raw.members, config.captions, generator))
            image = decode_image(
                raw.image, max_pixels=config.max_pixels, max_bytes=config.max_bytes, draft_size=self._draft_size
            )
        except SampleError as error:
            drops.add(error.reason, raw.shard)
            return None
        drops.num_kept += 1
        token = self._shorten(token, raw.shard, drops)
        return Sample(raw.key, train_pixels(image, config.transform, generator=generator), token)

    def _encode(self, caption: str) -> list[int]:
        token = self._tokenizer.encode(caption, self._config.max_tokens + 1)  # one more shows what will be cut
        if len(token) == _NUM_SPECIAL:
            raise SampleError("empty_caption")
        return token


class _EvalStream(IterableDataset):
    def __init__(self, config: DataConfig, *, rank: int, world_size: int, batch_size: int):
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._batch_size = batch_size
        self._shards = _expand(config)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        drops = DropLog(self._config.max_bad_share)
        return batch_once(self._samples(drops), self._collate, batch_size=self._batch_size, drops=drops)

    def _samples(self, drops: DropLog) -> Iterator[EvalSample]:
        num_workers = max(1, self._config.num_workers)
        start = self._rank + self._world_size * loader_worker()
        is_mine = every_nth(start, self._world_size * num_workers)  # one count over all shards
        for shard in self._shards:
            for raw in read_samples(str(shard), drops, max_bytes=self._config.max_bytes, is_mine=is_mine):
                sample = self._decode(raw, drops)
                if sample is not None:
                    yield sample

    def _decode(self, raw: RawSample, drops: DropLog) -> EvalSample | None:
        config = self._config
        try:
            meta = read_meta(raw.members)
            captions = list_captions(raw.members, meta, config.captions)
            image = decode_image(raw.image, max_pixels=config.max_pixels, max_bytes=config.max_bytes, draft_size=0)
        except SampleError as error:
            drops.add(error.reason, raw.shard)
            return None
        drops.num_kept += 1
        return EvalSample(raw.key, eval_pixels(image, config.transform), captions, meta)

    def _collate(self, samples: list[EvalSample]) -> dict[str, Any]:
        return collate_images(samples, self._config.transform)


def _expand(config: DataConfig) -> np.ndarray:
    """Names as one array: forked workers would copy a list page by page, by counting references."""
    return np.array(expand_shards(config.shards, allow_pipe=config.allow_pipe))


def _skip(raws: Iterator[RawSample], num_done: int, drops: DropLog) -> None:
    """Pass over what was used before; what is counted on the way was told before."""
    for _ in islice(raws, num_done):
        pass
    drops.take()
