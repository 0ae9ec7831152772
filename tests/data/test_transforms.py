"""Crops: reproducible, equal to torchvision's where that is the standard, and invertible to look at."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from sycoca.data.transforms import (
    TransformConfig,
    build_eval_transform,
    build_train_transform,
    denormalise,
    eval_pixels,
    train_pixels,
)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8))


def _halves() -> Image.Image:
    """Left half black, right half white."""
    pixel_HWC = np.zeros((12, 20, 3), dtype=np.uint8)
    pixel_HWC[:, 10:] = 255
    return Image.fromarray(pixel_HWC)


def test_one_generator_state_gives_one_crop() -> None:
    transform = build_train_transform(TransformConfig(size=8, scale=(0.3, 0.6)))
    image = _noise(30, 20)
    first, again, other = (transform(image, Random(seed)) for seed in (3, 3, 4))
    assert first.shape == (3, 8, 8)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [(64, 43), (43, 64), (50, 50), (300, 7), (9, 17)])
def test_centre_crop_is_torchvisions(size: tuple[int, int]) -> None:
    image = _noise(*size)
    reference = Compose([Resize(16, interpolation=InterpolationMode.BICUBIC), CenterCrop(16)])
    expected = np.asarray(reference(image)).astype(int)
    error = np.abs(eval_pixels(image, TransformConfig(size=16)).astype(int) - expected)
    assert error.mean() < 0.5  # of 255 levels; noise is the worst case, and a shift by half a pixel gives more than 20
    assert np.quantile(error, 0.95) <= 1


def test_squash_keeps_the_borders_that_a_centre_crop_loses() -> None:
    image = Image.new("RGB", (40, 10))
    image.paste((255, 255, 255), (0, 0, 8, 10))
    assert eval_pixels(image, TransformConfig(size=10, eval="squash")).max() == 255
    assert eval_pixels(image, TransformConfig(size=10)).max() == 0


def test_training_never_mirrors_unless_asked() -> None:
    config = TransformConfig(size=8)
    assert all(train_pixels(_halves(), config, generator=Random(i))[4, 0].max() < 50 for i in range(20))


def test_flip_one_always_mirrors() -> None:
    config = TransformConfig(size=8, flip=1.0)
    assert train_pixels(_halves(), config, generator=Random(0))[4, 0].min() > 200


def test_training_without_crop_sees_the_whole_image() -> None:
    config = TransformConfig(size=8, train="resize")
    image = _noise(30, 20)
    assert np.array_equal(*(train_pixels(image, config, generator=Random(seed)) for seed in (0, 1)))


@pytest.mark.parametrize("size", [(500, 1), (1, 500), (1, 1)])
def test_extreme_shapes_still_give_an_image(size: tuple[int, int]) -> None:
    config = TransformConfig(size=8)
    assert train_pixels(_noise(*size), config, generator=Random(0)).shape == (8, 8, 3)
    assert eval_pixels(_noise(*size), config).shape == (8, 8, 3)


def test_pixels_are_normalised_by_channel_and_come_back() -> None:
    config = TransformConfig(size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2))
    image_CHW = build_eval_transform(config)(Image.new("RGB", (6, 6), (255, 0, 51)))
    assert image_CHW[:, 0, 0].tolist() == pytest.approx([1.8, -0.5, -0.5], abs=1e-6)
    assert denormalise(image_CHW[None], config)[0, :, 2, 3].tolist() == pytest.approx([1.0, 0.0, 0.2], abs=1e-6)
