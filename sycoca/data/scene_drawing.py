"""How rendered scenes look: textured backgrounds and anti-aliased shapes."""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sycoca.data.scene_layout import COLOURS, SceneObject

Pixels = NDArray[np.floating]

SUPERSAMPLING = 8
JPEG_QUALITY = 95
COLOUR_JITTER = 12
"""Greatest change of a channel of an object's colour; this and the next three are of 255."""
GRAIN = 5
"""Standard deviation of every background's noise."""
BACKGROUND_RANGE = (60, 105)
"""Muted and dark, so that every object colour stands out."""
TEXTURE_CONTRAST = (30, 45)
TURN = 2 * np.pi


def draw_background(generator: np.random.Generator, *, texture: str, size: int) -> Pixels:
    """HWC in 0..255: a muted colour with a lighter one in the texture's pattern, and grain."""
    base_C = generator.uniform(*BACKGROUND_RANGE) + generator.uniform(-12, 12, 3)
    contrast = generator.uniform(*TEXTURE_CONTRAST)
    pattern_HW = _draw_pattern(generator, texture=texture, size=size)
    grain_HW = generator.standard_normal((size, size), dtype=np.float32) * GRAIN
    return ((pattern_HW * contrast + grain_HW)[..., None] + base_C).astype(np.float32)


def draw_object(generator: np.random.Generator, pixel_HWC: Pixels, *, item: SceneObject) -> NDArray[np.bool_]:
    """Paint `item` into `pixel_HWC` in place; return its HW mask, the pixels that it covers by half or more."""
    left, top, right, bottom = item.box
    cover_HW = _draw_stencil(item.shape, right - left)
    colour_C = np.add(COLOURS[item.colour], generator.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3))
    region_HWC = pixel_HWC[top:bottom, left:right]
    region_HWC += cover_HW[..., None] * (colour_C - region_HWC)
    mask_HW = np.zeros(pixel_HWC.shape[:2], dtype=bool)
    mask_HW[top:bottom, left:right] = cover_HW >= 0.5
    return mask_HW


def encode_image(image: Image.Image, file_format: str) -> bytes:
    """`JPEG` of high quality without colour subsampling, or `PNG`."""
    buffer = io.BytesIO()
    if file_format == "JPEG":
        image.save(buffer, file_format, quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, file_format)
    return buffer.getvalue()


def _draw_pattern(generator: np.random.Generator, *, texture: str, size: int) -> Pixels:
    """HW in [0, 1]."""
    unit = np.arange(size, dtype=np.float32) / size
    x_HW, y_HW = np.meshgrid(unit, unit)
    period = generator.uniform(0.14, 0.2)
    phase_x, phase_y = generator.uniform(0, 1, 2)
    angle = generator.uniform(0, TURN)
    along_HW = np.cos(angle) * x_HW + np.sin(angle) * y_HW
    wave_x_HW, wave_y_HW = np.sin(TURN * (x_HW / period + phase_x)), np.sin(TURN * (y_HW / period + phase_y))
    if texture == "striped":
        pattern_HW = _sharpen(np.sin(TURN * (along_HW / period + phase_x)))
    elif texture == "checked":
        pattern_HW = _sharpen(3 * wave_x_HW * wave_y_HW)
    elif texture == "dotted":
        pattern_HW = _sharpen(wave_x_HW + wave_y_HW - 0.9)
    elif texture == "speckled":
        pattern_HW = (generator.random((size, size)) > 0.7).astype(np.float32)
    elif texture == "shaded":
        pattern_HW = (along_HW - along_HW.min()) / (along_HW.max() - along_HW.min()) * 2
    else:
        assert texture == "plain", texture
        pattern_HW = np.zeros((size, size), dtype=np.float32)
    return pattern_HW


def _sharpen(wave_HW: Pixels) -> Pixels:
    return np.clip(wave_HW * 2.5 + 0.5, 0, 1)


@lru_cache(maxsize=1024)
def _draw_stencil(shape: str, diameter: int) -> Pixels:
    """The share of each pixel of a `diameter` x `diameter` box that the shape covers."""
    side = diameter * SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        inset = side * 0.26
        pen.ellipse((inset, inset, side - 1 - inset, side - 1 - inset), fill=0)
    if shape in OUTLINES:
        pen.polygon([(x * (side - 1), y * (side - 1)) for x, y in OUTLINES[shape]], fill=255)
    return np.asarray(canvas.resize((diameter, diameter), Image.Resampling.BOX), dtype=np.float32) / 255


def _trace_star() -> list[tuple[float, float]]:
    angle = TURN * np.arange(10) / 10 - TURN / 4
    radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    return list(zip((0.5 + radius * np.cos(angle)).tolist(), (0.5 + radius * np.sin(angle)).tolist(), strict=True))


def _trace_heart() -> list[tuple[float, float]]:
    """The curve of x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to the unit square."""
    t = np.linspace(0, TURN, 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return list(zip(((x + 16) / 32).tolist(), ((y - y.min()) / np.ptp(y)).tolist(), strict=True))


OUTLINES = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.04), (1, 0.96), (0, 0.96)],
    "star": _trace_star(),
    "cross": [
        (x / 3, y / 3)
        for x, y in [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
    ],
    "heart": _trace_heart(),
    "diamond": [(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)],
}
"""Corners in the unit square, y downwards."""
