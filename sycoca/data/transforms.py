"""Images to pixels of one size: crop and resize in one call of Pillow, then normalise."""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from sycoca.config import Config

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]

_REDUCING_GAP = 2.0  # Pillow: "almost indistinguishable" from a plain resize, and faster on large images
_SHIFT_SHARE = 0.45  # the farthest RandAugment moves an image, of its side (timm.data.transforms_factory)
_CROP_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop


class TransformConfig(Config):
    """Preprocessing of training and evaluation; it travels with the checkpoint."""

    size: int = Field(default=224, ge=1)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
    train: Literal["random_resized_crop", "resize"] = "random_resized_crop"
    scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that a random crop keeps."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop, before it is squashed to a square."""
    eval: Literal["squash", "center_crop"] = "center_crop"
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a mirror image. Off: captions speak of left and right."""
    rand_augment: str | None = None
    """RandAugment of training images in timm's notation, for example `rand-m9-mstd0.5-inc1`. For labels, not for captions."""

    @field_validator("rand_augment")
    @classmethod
    def _check_rand_augment(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                _build_rand_augment(name, size=224, fill=(0, 0, 0))
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError("expected timm's notation, for example rand-m9-mstd0.5-inc1") from error
        return name


def build_train_transform(config: TransformConfig) -> Callable[[Image.Image, Random], Tensor]:
    """`(RGB image, generator) -> CHW float32`, normalised; the same generator state gives the same crop."""

    def transform(image: Image.Image, generator: Random) -> Tensor:
        return normalise([train_pixels(image, config, generator=generator)], config)[0]

    return transform


def build_eval_transform(config: TransformConfig) -> Callable[[Image.Image], Tensor]:
    """`RGB image -> CHW float32`, normalised."""

    def transform(image: Image.Image) -> Tensor:
        return normalise([eval_pixels(image, config)], config)[0]

    return transform


def train_pixels(image: Image.Image, config: TransformConfig, *, generator: Random) -> Pixels:
    """HWC uint8 of a random crop, or of the whole image."""
    if config.train == "random_resized_crop":
        box = _random_box(image.size, config, generator)
    else:
        box = (0, 0, *image.size)
    resized = image.resize((config.size, config.size), _filter(config), box=box, reducing_gap=_REDUCING_GAP)
    if config.flip and generator.random() < config.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.rand_augment is not None:
        resized = _rand_augment(resized, config.rand_augment, mean=config.mean, generator=generator)
    return np.array(resized)


def eval_pixels(image: Image.Image, config: TransformConfig) -> Pixels:
    """HWC uint8 of the centre square, or of the whole image squashed to a square."""
    box = _center_box(image.size, config.size) if config.eval == "center_crop" else (0, 0, *image.size)
    return np.array(image.resize((config.size, config.size), _filter(config), box=box))


def num_pixels_needed(config: TransformConfig) -> int:
    """The shortest side that a training image must have so that a typical crop is not enlarged."""
    return math.ceil(config.size / math.sqrt(config.scale[0]))


def normalise(pixel_BHWC: Sequence[Pixels], config: TransformConfig) -> Tensor:
    """BCHW float32 with the configured mean and standard deviation taken out."""
    image_BCHW = torch.empty((len(pixel_BHWC), 3, config.size, config.size))
    shift_C11 = torch.tensor([mean / std for mean, std in zip(config.mean, config.std)])[:, None, None]
    scale_C11 = torch.tensor([1 / (255 * std) for std in config.std])[:, None, None]
    for image_CHW, pixel_HWC in zip(image_BCHW, pixel_BHWC):  # one at a time: it stays in the processor's cache
        image_CHW.copy_(torch.from_numpy(pixel_HWC).permute(2, 0, 1)).mul_(scale_C11).sub_(shift_C11)
    return image_BCHW


def denormalise(image_BCHW: Tensor, config: TransformConfig) -> Tensor:
    """The image in [0, 1], to look at; values outside are clipped."""
    mean_C11 = torch.tensor(config.mean, device=image_BCHW.device)[:, None, None]
    std_C11 = torch.tensor(config.std, device=image_BCHW.device)[:, None, None]
    return (image_BCHW * std_C11 + mean_C11).clamp(0, 1)


def _filter(config: TransformConfig) -> Image.Resampling:
    return Image.Resampling[config.interpolation.upper()]


def _rand_augment(
    image: Image.Image, name: str, *, mean: tuple[float, float, float], generator: Random
) -> Image.Image:
    """RandAugment drawn from `generator`: timm draws from the process's generators, which are left as they were."""
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    augment = _build_rand_augment(name, size=image.width, fill=(red, green, blue))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(generator.getrandbits(64))
    np.random.seed(generator.getrandbits(32))
    try:
        return augment(image)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache
def _build_rand_augment(name: str, *, size: int, fill: tuple[int, int, int]) -> Any:
    from timm.data.auto_augment import rand_augment_transform  # slow to import, and few ask for it

    return rand_augment_transform(name, {"translate_const": int(_SHIFT_SHARE * size), "img_mean": fill})


def _random_box(size: tuple[int, int], config: TransformConfig, generator: Random) -> Box:
    """A crop as torchvision's RandomResizedCrop draws it."""
    width, height = size
    low, high = map(math.log, config.ratio)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * generator.uniform(*config.scale)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * config.ratio[1])), min(height, round(width / config.ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)


def _center_box(size: tuple[int, int], target: int) -> Box:
    """The part of the image that torchvision's Resize (shortest side) and CenterCrop keep, in the image's own pixels."""
    width, height = size
    short = min(width, height)
    num_columns, num_rows = int(target * width / short), int(target * height / short)
    left, top = round((num_columns - target) / 2), round((num_rows - target) / 2)
    step_x, step_y = width / num_columns, height / num_rows
    return left * step_x, top * step_y, min(width, (left + target) * step_x), min(height, (top + target) * step_y)
