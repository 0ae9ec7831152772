"""Captions without their images, by image: from shards, or from text files."""

from collections.abc import Iterator
from pathlib import Path

from sycoca.data.decode import CaptionConfig, SampleError, list_captions, read_meta
from sycoca.data.position import DropLog
from sycoca.data.shards import LOCAL, Access, expand_shards, read_samples
from sycoca.distributed import gather_objects, rank, world_size
from sycoca.types import DataError, image_of

_TEXT_FILE = ".txt"
_MAX_IMAGE_BYTES = 20_000_000  # images are read past, not decoded


def read_captions(sources: list[str], config: CaptionConfig, *, max_bad_share: float = 0.2) -> dict[str, list[str]]:
    """Every caption by image, in the order of the images' keys, on every rank; ranks share the reading.

    A source is a shard, a folder of shards or a pattern as in `data.shards`, or a text file (`.txt`) of one caption a line; a
    tab in a line ends the name of its image, and a line without one is a caption of an image of its own. Raises DataError.
    """
    drops = DropLog(max_bad_share)
    own: dict[str, list[str]] = {}
    for name in expand_shards(sources, allow_pipe=False)[rank() :: world_size()]:
        pairs = _read_lines(Path(name)) if name.endswith(_TEXT_FILE) else _read_shard(name, config, drops)
        for image, caption in pairs:
            own.setdefault(image, []).append(caption)
    whole: dict[str, list[str]] = {}
    for share in gather_objects(own):
        for image, captions in share.items():
            whole.setdefault(image, []).extend(captions)
    if not whole:
        raise DataError(f"{', '.join(sources)}: found no caption; {drops.describe_worst()}")
    return dict(sorted(whole.items()))


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        image, tab, caption = line.partition("\t")
        if not tab:
            image, caption = f"{path.name}:{number}", line
        if caption.strip():
            yield image, caption.strip()


def read_shard_captions(
    shard: str, config: CaptionConfig, drops: DropLog, *, max_bytes: int, access: Access = LOCAL
) -> Iterator[tuple[str, list[str]]]:
    """The image and the captions of every sample of a shard; samples without any are counted and left out."""
    for raw in read_samples(shard, drops, max_bytes=max_bytes, is_mine=lambda: True, access=access):
        try:
            captions = list_captions(raw.members, read_meta(raw.members), config)
        except SampleError as error:
            drops.add(error.reason, shard)
            continue
        drops.num_kept += 1
        yield image_of(raw.key), captions


def _read_shard(shard: str, config: CaptionConfig, drops: DropLog) -> Iterator[tuple[str, str]]:
    for image, captions in read_shard_captions(shard, config, drops, max_bytes=_MAX_IMAGE_BYTES):
        yield from ((image, caption) for caption in captions if caption.strip())
