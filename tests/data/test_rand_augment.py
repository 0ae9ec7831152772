"""RandAugment: drawn from the sample's own generator, and nobody else's random numbers move."""

import random
from random import Random

import numpy as np
import pytest
from PIL import Image

from sycoca.config import parse_config
from sycoca.data.transforms import TransformConfig, eval_pixels, train_pixels
from sycoca.types import ConfigError

CONFIG = TransformConfig(size=24, rand_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def test_one_generator_state_gives_one_image(image: Image.Image):
    first, again = ([train_pixels(image, CONFIG, generator=Random(seed)).tobytes() for seed in range(8)] for _ in range(2))
    assert first == again
    assert len(set(first)) == 8


def test_the_process_s_generators_do_not_matter_and_do_not_move(image: Image.Image):
    expected = train_pixels(image, CONFIG, generator=Random(3))
    random.seed(5)
    np.random.seed(5)
    assert np.array_equal(train_pixels(image, CONFIG, generator=Random(3)), expected)
    drawn = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    assert drawn == (random.random(), np.random.rand())


def test_it_changes_training_images_only(image: Image.Image):
    plain = CONFIG.model_copy(update={"rand_augment": None})
    pairs = [
        (train_pixels(image, CONFIG, generator=Random(seed)), train_pixels(image, plain, generator=Random(seed)))
        for seed in range(20)
    ]
    assert sum(not np.array_equal(*pair) for pair in pairs) > 10
    assert np.array_equal(eval_pixels(image, CONFIG), eval_pixels(image, plain))


@pytest.mark.parametrize("name", ["", "random", "rand-q3"])
def test_a_wrong_notation_is_explained(name: str):
    with pytest.raises(ConfigError, match=r"rand_augment: .*rand-m9-mstd0\.5-inc1"):
        parse_config(TransformConfig, {"rand_augment": name}, source="test")
