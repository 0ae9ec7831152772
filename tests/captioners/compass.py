"""An encoder whose embeddings are known by hand: an image is its first pixel, a text is the numbers that it spells."""

import torch
from torch import Tensor

from sycoca.captioners.clip_towers import Towers
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.data.transforms import TransformConfig


def spell(row_E: Tensor) -> str:
    """The text that is embedded as this row."""
    return " ".join(f"{value:.6f}" for value in row_E.tolist())


def build_compass(size: int = 4) -> FrozenEncoder:
    """Embeddings of three numbers; words that are no numbers are passed over."""

    def read(text: str) -> list[float]:
        return [float(word) for word in text.split() if word[-1].isdigit()] or [0.0, 0.0, 0.0]

    towers = Towers(
        module=torch.nn.Identity(), image=lambda image_BCHW: image_BCHW[:, :, 0, 0],
        text=lambda texts: torch.tensor([read(text) for text in texts]), patches=lambda image_BCHW: image_BCHW.flatten(2).mT,
        transform=TransformConfig(size=size), logit_scale=1.0,
    )  # fmt: skip
    return FrozenEncoder("compass", towers, "cpu")
