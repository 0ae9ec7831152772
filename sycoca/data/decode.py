"""Raw bytes of one sample to an RGB image and a caption; whatever cannot be used is a SampleError with its reason."""

import json
import struct
import zlib
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import PositiveFloat, field_validator

from sycoca.config import Config

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF")
# What Pillow's readers raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError, OverflowError)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SampleError(ValueError):
    """A sample that is dropped; `reason` is the name under which it is counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class CaptionConfig(Config):
    """Where captions come from.

    Without `sources`: the json's `captions`, else its `caption`, else the txt. With them: a source is drawn with the
    given weights among those that the sample has; `txt` is the text file, `json.a.b` an entry of the json.
    """

    sources: dict[str, PositiveFloat] = {}

    @field_validator("sources")
    @classmethod
    def _check_names(cls, sources: dict[str, float]) -> dict[str, float]:
        wrong = [name for name in sources if name != "txt" and not name.startswith("json.")]
        if wrong:
            raise ValueError(f"expected sources named `txt` or `json.<entry>`, found {wrong[0]!r}")
        return sources


def decode_image(data: bytes, *, max_pixels: int, max_bytes: int, draft_size: int) -> Image.Image:
    """An upright RGB image: first frame, transparency on white, 16 bits scaled to 8.

    `draft_size` is the shortest side that is needed: a JPEG at least twice as large is decoded at a half, a quarter or
    an eighth; 0 decodes in full. Raises SampleError; sizes are judged from the header, before anything is decoded.
    """
    if not data:
        raise SampleError("empty_image")
    if len(data) > max_bytes:
        raise SampleError("image_too_many_bytes")
    image = _open_image(data)
    if image.width * image.height > max_pixels:
        raise SampleError("image_too_large")
    if draft_size:
        image.draft(None, (draft_size, draft_size))  # pyright: ignore[reportArgumentType]  None keeps the mode
    try:
        image.load()
        return _upright(_to_rgb(image), _orientation(image))
    except _DAMAGE as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("truncated_image" if "truncated" in str(error) else "corrupt_image") from error


def choose_caption(members: dict[str, bytes], config: CaptionConfig, generator: Random) -> str:
    """One caption of the sample, at random where it has several. Raises SampleError."""
    found = _captions_by_source(members, read_meta(members), config)
    names = list(found)
    if config.sources:
        names = generator.choices(names, weights=[config.sources[name] for name in names])
    return generator.choice(found[names[0]])


def list_captions(members: dict[str, bytes], meta: dict[str, Any], config: CaptionConfig) -> list[str]:
    """Every caption of the sample, in order. Raises SampleError."""
    return [caption for captions in _captions_by_source(members, meta, config).values() for caption in captions]


def read_meta(members: dict[str, bytes]) -> dict[str, Any]:
    """The sample's json, or nothing where it has none. Raises SampleError("bad_json")."""
    if "json" not in members:
        return {}
    try:
        meta = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json") from error
    if not isinstance(meta, dict):
        raise SampleError("bad_json")
    return meta


def _open_image(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large") from error
    except UnidentifiedImageError as error:
        raise SampleError("corrupt_image" if data.startswith(_SIGNATURES) else "unsupported_image") from error
    except _DAMAGE as error:
        raise SampleError("corrupt_image") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise SampleError("unsupported_image")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or where it cannot be read: the pixels are sound."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _captions_by_source(members: dict[str, bytes], meta: dict[str, Any], config: CaptionConfig) -> dict[str, list[str]]:
    """At least one source, each with at least one caption that is not empty."""
    if config.sources:
        texts = {name: _texts_of(name, members, meta) for name in config.sources}
    else:
        names = ("json.captions", "json.caption", "txt")
        texts = next(({name: found} for name in names if (found := _texts_of(name, members, meta))), {})
    if not any(texts.values()):
        raise SampleError("missing_caption")
    kept = {name: [text.strip() for text in group if text.strip()] for name, group in texts.items()}
    kept = {name: group for name, group in kept.items() if group}
    if not kept:
        raise SampleError("empty_caption")
    return kept


def _texts_of(source: str, members: dict[str, bytes], meta: dict[str, Any]) -> list[str]:
    if source == "txt":
        return [_read_text(members["txt"])] if "txt" in members else []
    value: Any = meta
    for name in source.split(".")[1:]:
        value = value.get(name) if isinstance(value, dict) else None
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise SampleError("bad_json")
    return values


def _read_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("bad_text") from error
