"""The loaders: an infinite training stream that resumes exactly, and a finite evaluation pass.

Order is a function of (seed, epoch, global worker). An epoch's shards are permuted with the shared seed and dealt to the
workers; what is left of an uneven deal is shared sample by sample. A worker reads its shards in groups, through a shuffle
buffer that is empty at each group's end, so a position is (epoch, group, offset) and resuming re-reads one group at most,
also with another number of processes or workers (data/elastic.py). Several data sets are mixed by weight (data/mixing.py).
Crops and captions are drawn from (seed, epoch, key). What a worker counts travels in its batches: it cannot reach the
parent process in another way.
"""

from collections.abc import Iterator
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import Self

from sycoca.data.cache import Access, CacheConfig
from sycoca.data.collate import EvalSample, Sample, collate_images
from sycoca.data.decode import CaptionConfig, SampleError, choose_caption, decode_image, list_captions, read_meta
from sycoca.data.elastic import Layout, Stand
from sycoca.data.mixing import SourceConfig, mix
from sycoca.data.order import every_nth
from sycoca.data.position import DropLog
from sycoca.data.shards import RawSample, expand_shards, read_samples
from sycoca.data.stream import LoaderConfig, TrainStream, batch_once, build_loader, fingerprint, loader_worker
from sycoca.data.tokenizer import Tokenizer
from sycoca.data.transfers import RemoteConfig
from sycoca.data.transforms import eval_pixels, train_pixels
from sycoca.data.walk import ShardWalk

_NUM_SPECIAL = 2  # a caption of bos and eos says nothing


class DataConfig(LoaderConfig):
    """Which shards are read, and how samples become batches."""

    shards: list[str] = []
    """Tar files, folders of them, `{000..123}` ranges or wildcards; URLs of any file system that fsspec knows."""
    sources: list[SourceConfig] = []
    """In place of `shards`: several data sets, mixed by weight."""
    shuffle_buffer: int = Field(default=2000, ge=1)
    """Raw samples a worker holds to draw from."""
    shards_per_group: int = Field(default=4, ge=1)
    """Shards a worker reads together; resuming re-reads at most this many."""
    captions: CaptionConfig = CaptionConfig()
    allow_pipe: bool = False
    """Whether `pipe:` shards may run commands."""
    remote: RemoteConfig = RemoteConfig()
    cache: CacheConfig | None = None
    """Where shards from URLs are kept; without it they are streamed anew every epoch."""

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.shards and self.sources:
            raise ValueError("expected either `shards` or `sources`, found both; set shards: [] where it is inherited")
        if not self.shards and "shards" not in self.model_fields_set and not self.sources:
            raise ValueError("expected `shards`, or `sources` to mix; found neither")
        return self

    def mixed(self) -> list[SourceConfig]:
        """The data sets: one without sources."""
        return self.sources or [SourceConfig.model_construct(shards=self.shards, weight=1.0, captions=None, name=None)]

    def captions_of(self, source: SourceConfig) -> CaptionConfig:
        """The source's own choice of captions, or everyone's."""
        return self.captions if source.captions is None else source.captions

    def access(self, seed: str) -> Access:
        """How shards elsewhere are read."""
        return Access(self.remote, self.cache, seed)


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
    order_settings = "data.shards or data.sources, data.shuffle_buffer and data.shards_per_group"

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, seed: int, rank: int, world_size: int):
        super().__init__(config, tokenizer, seed=seed, rank=rank, world_size=world_size)
        self._sources = config.mixed()
        self._walks = [
            ShardWalk(
                shards, seed=f"{seed}/source {number}" if config.sources else f"{seed}", shuffle_buffer=config.shuffle_buffer,
                shards_per_group=config.shards_per_group, max_bytes=config.max_bytes,
            )
            for number, shards in enumerate(_expand(config))
        ]  # fmt: skip

    @cached_property
    def order(self) -> str:
        """Of shards by file name: a data set may move to another folder."""
        facts = (self._seed, self._rank, self._num_workers, self._num_streams, self._config.shuffle_buffer)
        return fingerprint((facts, self._config.shards_per_group, *self._names()))

    @cached_property
    def data(self) -> str:
        return fingerprint((self._seed, self._config.shuffle_buffer, self._config.shards_per_group, *self._names()))

    def _names(self) -> list[Any]:
        names = [[str(name).rsplit("/", 1)[-1] for name in walk.shards] for walk in self._walks]
        return [*names, [source.weight for source in self._config.sources]] if self._config.sources else names

    @property
    def layouts(self) -> list[Layout]:
        return [walk.layout for walk in self._walks]

    def _walk(self, worker: int, drops: DropLog) -> Iterator[tuple[tuple[int, RawSample], Stand]]:
        """Number of a source and raw sample without end, each with the stand that follows it."""
        stream = self._rank * self._num_workers + worker
        start = self._starts.get(str(worker))
        is_mixed = bool(self._config.sources)
        stands = start["sources"] if start and is_mixed else [start] * len(self._walks)
        walks = [
            walk.samples(
                stream, self._num_streams, stand=stand, carried=self.carried(number), drops=drops,
                access=self._config.access(f"{self._seed}/{stream}"),
            )
            for number, (walk, stand) in enumerate(zip(self._walks, stands, strict=True))
        ]  # fmt: skip
        if not is_mixed:
            return (((0, raw), stand) for raw, stand in walks[0])
        weights = [source.weight for source in self._sources]
        return mix(walks, weights, seed=f"{self._seed}/{stream}", start=start or {"place": self._first_place})

    def _decode(self, item: tuple[int, RawSample], epoch: int, drops: DropLog) -> Sample | None:
        """Text first: it fails cheaply. None where the sample was dropped."""
        config, (number, raw) = self._config, item
        source = self._sources[number]
        generator = Random(f"{self._seed}/{epoch}/{raw.key}")
        try:
            token = self._encode(choose_caption(raw.members, config.captions_of(source), generator))
            image = decode_image(
                raw.image, max_pixels=config.max_pixels, max_bytes=config.max_bytes, draft_size=self._draft_size
            )
        except SampleError as error:
            drops.add(error.reason, raw.shard)
            return None
        drops.keep((source.name or str(number)) if config.sources else None)
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
        self._sources = list(zip(config.mixed(), _expand(config), strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        drops = DropLog(self._config.max_bad_share)
        return batch_once(self._samples(drops), self._collate, batch_size=self._batch_size, drops=drops)

    def _samples(self, drops: DropLog) -> Iterator[EvalSample]:
        num_workers = max(1, self._config.num_workers)
        start = self._rank + self._world_size * loader_worker()
        is_mine = every_nth(start, self._world_size * num_workers)  # one count over all shards
        access = self._config.access(f"evaluation/{start}")
        for source, shards in self._sources:
            captions = self._config.captions_of(source)
            for shard in map(str, shards):
                for raw in read_samples(shard, drops, max_bytes=self._config.max_bytes, is_mine=is_mine, access=access):
                    sample = self._decode(raw, captions, drops)
                    if sample is not None:
                        yield sample

    def _decode(self, raw: RawSample, captions: CaptionConfig, drops: DropLog) -> EvalSample | None:
        config = self._config
        try:
            meta = read_meta(raw.members)
            found = list_captions(raw.members, meta, captions)
            image = decode_image(raw.image, max_pixels=config.max_pixels, max_bytes=config.max_bytes, draft_size=0)
        except SampleError as error:
            drops.add(error.reason, raw.shard)
            return None
        drops.num_kept += 1
        return EvalSample(raw.key, eval_pixels(image, config.transform), found, meta)

    def _collate(self, samples: list[EvalSample]) -> dict[str, Any]:
        return collate_images(samples, self._config.transform)


def _expand(config: DataConfig) -> list[np.ndarray]:
    """Of each source, names as one array: forked workers would copy a list page by page, by counting references."""
    return [np.array(expand_shards(source.shards, allow_pipe=config.allow_pipe)) for source in config.mixed()]
