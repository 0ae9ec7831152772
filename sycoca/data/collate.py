"""Samples of one size to the tensors of a batch."""

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sycoca.data.tokenizer import pad_rows
from sycoca.data.transforms import Pixels, TransformConfig, normalise


class Sample(NamedTuple):
    """One decoded pair, before normalisation: bytes are four times smaller than floats."""

    key: str
    pixel_HWC: Pixels
    token: list[int]


class LabelledSample(NamedTuple):
    """One decoded image with its text (maybe empty) and what is to be learnt: a class, or a share of each answer."""

    key: str
    pixel_HWC: Pixels
    token: list[int]
    target: int | NDArray[np.float32]


AnySample = Sample | LabelledSample


class EvalSample(NamedTuple):
    """One decoded image with everything that is known of it."""

    key: str
    pixel_HWC: Pixels
    captions: list[str]
    meta: dict[str, Any]


def collate_pairs(samples: Sequence[AnySample], transform: TransformConfig, *, pad: int, num_columns: int) -> dict[str, Any]:
    """`Batch` without its position; captions are padded to `num_columns`."""
    image_BCHW = normalise([sample.pixel_HWC for sample in samples], transform)
    return {"image": image_BCHW, **_collate_tokens(samples, pad, num_columns)}


def collate_labelled(
    samples: Sequence[LabelledSample], transform: TransformConfig, *, pad: int, num_columns: int
) -> dict[str, Any]:
    """As `collate_pairs`, with `target` (B int64 of classes, or float32 B x answers) and `image_row` (B int64): samples that
    follow each other and hold the same array of pixels share a row of `image`."""
    is_new_B = [place == 0 or sample.pixel_HWC is not samples[place - 1].pixel_HWC for place, sample in enumerate(samples)]
    return {
        "image": normalise([sample.pixel_HWC for sample in compress(samples, is_new_B)], transform),
        "image_row": torch.tensor(is_new_B).cumsum(0) - 1,
        "target": torch.from_numpy(np.stack([np.asarray(sample.target) for sample in samples])),
        **_collate_tokens(samples, pad, num_columns),
    }


def _collate_tokens(samples: Sequence[AnySample], pad: int, num_columns: int) -> dict[str, Any]:
    token_BL, length_B = pad_rows([sample.token for sample in samples], num_columns, pad)
    return {"token": token_BL, "length": length_B, "key": [sample.key for sample in samples]}


def collate_images(samples: list[EvalSample], transform: TransformConfig) -> dict[str, Any]:
    """Images, keys, all captions and the json of each sample."""
    return {
        "image": normalise([sample.pixel_HWC for sample in samples], transform),
        "key": [sample.key for sample in samples],
        "captions": [sample.captions for sample in samples],
        "meta": [sample.meta for sample in samples],
    }


def num_columns(longest: int, *, round_to: int, max_tokens: int) -> int:
    """Length of a batch whose longest caption has `longest` tokens: few lengths mean few compiled kernels."""
    return min(-(-longest // round_to) * round_to, max_tokens)
