"""Turn records of a data set into shards: which row goes where, which rows are bad and why, and what a sample holds."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from sycoca.data.decode import SampleError, decode_image
from sycoca.data.readers import ImageLocation, Record, read_bytes
from sycoca.data.shard_writer import BadRow, Sample, hash_rows, write_shards
from sycoca.types import NUMBER_MARK, DataError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Image formats that are copied as they are, with their extension in a shard."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit, beyond which it warns of a decompression bomb."""
MAX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Resizing:
    """`shortest` brings the shorter side to `side` pixels and never enlarges, `squash` brings both.

    An image that has its size already is copied.
    """

    side: int
    mode: Literal["shortest", "squash"] = "shortest"
    jpeg_quality: int = 95


@dataclass(frozen=True, slots=True)
class Conversion:
    """`captions`: `all` makes one sample an image, `each` one sample a caption. No `shuffle_seed` keeps the source's order."""

    samples_per_shard: int = 1_000
    captions: Literal["all", "each"] = "all"
    resizing: Resizing | None = None
    shuffle_seed: int | None = None


class Row(NamedTuple):
    """What becomes one sample."""

    key: str
    image: ImageLocation
    captions: tuple[str, ...]


def make_shards(records: Iterable[Record], folder: Path, *, conversion: Conversion, num_processes: int) -> dict[str, Any]:
    """Write `00000.tar`, ... and say how many samples, bytes and bad rows there are; goes on where it was interrupted.

    A sample is `<key>.jpg` (or png, webp), `<key>.txt` (its first caption) and, with `all`, `<key>.json` with every caption.
    Raises DataError for numbers that cannot be used, for a folder begun otherwise, and where no row is good.
    """
    _check_numbers(conversion)
    rows, bad_rows = plan_rows(records, captions=conversion.captions)
    if conversion.shuffle_seed is not None:
        rows = [rows[place] for place in np.random.default_rng(conversion.shuffle_seed).permutation(len(rows))]
    step = conversion.samples_per_shard
    jobs = {f"{number:05d}": rows[start : start + step] for number, start in enumerate(range(0, len(rows), step))}
    source = hash_rows([row.key, row.image.path.name, row.image.offset, row.captions] for row in rows)
    index = write_shards(
        folder,
        partial(_read_samples, conversion),
        jobs=jobs,
        plan={"made": "shards", "source": source, **asdict(conversion)},
        num_processes=num_processes,
        bad_rows=bad_rows,
    )
    totals = {name: index[name] for name in ("num_samples", "num_bytes", "num_bad_rows")}
    return {"folder": str(folder), "num_shards": len(index["shards"]), **totals}


def plan_rows(records: Iterable[Record], *, captions: Literal["all", "each"]) -> tuple[list[Row], list[BadRow]]:
    """The samples to make, in the source's order, and the rows that cannot become one."""
    rows: list[Row] = []
    bad_rows: list[BadRow] = []
    seen: set[str] = set()
    for record in records:
        bad_rows += [BadRow(record.key, "empty_caption") for caption in record.captions if not caption]
        texts = tuple(caption for caption in record.captions if caption)
        if record.image is None:
            bad_rows.append(BadRow(record.key, "missing_image"))
        elif record.key in seen:
            bad_rows.append(BadRow(record.key, "duplicate_key"))
        elif not record.captions:
            bad_rows.append(BadRow(record.key, "no_caption"))
        elif texts:
            seen.add(record.key)
            row = Row(record.key, record.image, texts)
            rows += _split_captions(row) if captions == "each" else [row]
    return rows, bad_rows


def _split_captions(row: Row) -> list[Row]:
    return [Row(f"{row.key}{NUMBER_MARK}{number}", row.image, (text,)) for number, text in enumerate(row.captions)]


def _check_numbers(conversion: Conversion) -> None:
    if conversion.samples_per_shard < 1:
        raise DataError(f"expected at least one sample a shard, found {conversion.samples_per_shard}")
    if conversion.resizing is not None and (conversion.resizing.side < 1 or not 1 <= conversion.resizing.jpeg_quality <= 100):
        raise DataError(f"expected a side of at least 1 and a JPEG quality of 1 to 100, found {conversion.resizing}")


def _read_samples(conversion: Conversion, rows: list[Row]) -> Iterator[Sample | BadRow]:
    for row in rows:
        try:
            extension, content = _load_image(row.image, conversion.resizing)
        except SampleError as error:
            yield BadRow(row.key, error.reason)
            continue
        members = {extension: content, "txt": row.captions[0].encode()}
        if conversion.captions == "all":
            members["json"] = json.dumps({"captions": row.captions}, ensure_ascii=False).encode()
        yield Sample(row.key, members)


def _load_image(location: ImageLocation, resizing: Resizing | None) -> tuple[str, bytes]:
    """Extension and bytes. The image is decoded even where its bytes are copied: a cut JPEG passes every cheaper check."""
    content = read_bytes(location)
    draft_size = resizing.side if resizing is not None else 0
    image = decode_image(content, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES, draft_size=draft_size)
    with Image.open(io.BytesIO(content)) as header:
        extension = EXTENSIONS.get(header.format or "")
        is_large_enough = resizing is None or _target_size(header.size, resizing) == header.size
    if is_large_enough and extension is not None:
        return extension, content
    if resizing is None:
        raise SampleError("unsupported_image")
    buffer = io.BytesIO()
    resized = image.resize(_target_size(image.size, resizing), Image.Resampling.BICUBIC)
    resized.save(buffer, "JPEG", quality=resizing.jpeg_quality)
    return "jpg", buffer.getvalue()


def _target_size(size: tuple[int, int], resizing: Resizing) -> tuple[int, int]:
    """Width and height; `shortest` never enlarges."""
    if resizing.mode == "squash":
        return resizing.side, resizing.side
    scale = min(1.0, resizing.side / min(size))
    return round(size[0] * scale), round(size[1] * scale)
