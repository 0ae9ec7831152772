"""A world whose images are sums of what is in them: texts are sums of their words, images the same, turned and moved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from tiny_lms import build_lm
from torch import Tensor

from sycoca.captioners.clip_towers import Towers
from sycoca.captioners.embeddings import EmbeddedBlock
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.token_vocabulary import TokenVocabulary
from sycoca.captioners.words import content_words
from sycoca.data.transforms import TransformConfig

E, SIZE = 24, 4
WORDS_AN_IMAGE, CAPTIONS_AN_IMAGE, BLOCK = 3, 2, 37
SAME_SHARE = 0.6
"""How much of an image's embedding is where its text's is; the rest is turned."""


@cache
def toy_lm() -> CaptionLM:
    return build_lm()


@cache
def toy_words() -> list[str]:
    """Content words of which the language model has a token."""
    return [word for word in TokenVocabulary(toy_lm()).different_words if content_words(word) == [word]]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_rows(texts: Sequence[str], seed: int = 0) -> Tensor:
    """NE: the sum of the words' vectors, and an offset of all texts."""
    words = toy_words()
    vector_NE = noise(len(words), E, seed=seed + 100)
    rows = [[words.index(word) for word in content_words(text) if word in words] for text in texts]
    return torch.stack([vector_NE[of_text].sum(0) for of_text in rows]) + noise(E, seed=seed + 101)


def build_encoder(seed: int = 0) -> FrozenEncoder:
    """An image's first pixels are its embedding (`paint` makes it one)."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, seed)
    towers = Towers(
        module=module, image=lambda image_BCHW: image_BCHW.flatten(1)[:, :E], text=lambda texts: text_rows(texts, seed),
        patches=lambda image_BCHW: image_BCHW.flatten(2).mT, transform=TransformConfig(size=SIZE), logit_scale=1.0,
    )  # fmt: skip
    return FrozenEncoder("toy", towers, "cpu")


def paint(image_NE: Tensor) -> Tensor:
    """NCHW: images of which these are the embeddings."""
    flat = torch.zeros(len(image_NE), 3 * SIZE * SIZE)
    flat[:, :E] = image_NE
    return flat.view(-1, 3, SIZE, SIZE)


@dataclass(frozen=True)
class ToyPairs:
    """Pairs in memory. Satisfies Pairs."""

    keys: list[str]
    texts: list[str]
    image_NE: Tensor
    text_NE: Tensor
    fingerprint: str
    split: str = "train"

    @property
    def num_texts(self) -> int:
        return len(self.texts)

    def __len__(self) -> int:
        return len(self.keys)

    def image_rows(self, rows: Sequence[int], /) -> Tensor:
        return self.image_NE[list(rows)]

    def blocks(self) -> Iterator[EmbeddedBlock]:
        for start in range(0, len(self), BLOCK):
            keys = self.keys[start : start + BLOCK]
            texts = slice(CAPTIONS_AN_IMAGE * start, CAPTIONS_AN_IMAGE * (start + len(keys)))
            owner_N = torch.arange(len(keys)).repeat_interleave(CAPTIONS_AN_IMAGE)
            image_NE = self.image_NE[start : start + BLOCK]
            yield EmbeddedBlock(keys, self.texts[texts], image_NE, self.text_NE[texts], owner_N)


def make_pairs(encoder: FrozenEncoder, num: int, *, seed: int, split: str = "train") -> ToyPairs:
    """Images of three words each; their captions have two of them."""
    words, generator = toy_words(), torch.Generator().manual_seed(seed)
    things = [[words[n] for n in torch.randperm(len(words), generator=generator)[:WORDS_AN_IMAGE]] for _ in range(num)]
    texts = [f"the {of_image[c]} and a {of_image[c + 1]}" for of_image in things for c in range(CAPTIONS_AN_IMAGE)]
    whole_NE = encoder.encode_text([" ".join(of_image) for of_image in things])
    turn_EE = torch.linalg.qr(noise(E, E, seed=5)).Q
    mixed_NE = SAME_SHARE * whole_NE + (1 - SAME_SHARE) * whole_NE @ turn_EE
    image_NE = mixed_NE + noise(E, seed=6) + 0.3 * noise(num, E, seed=seed + 7)
    keys = [f"{split}{seed}_{number}" for number in range(num)]
    return ToyPairs(keys, texts, image_NE, encoder.encode_text(texts), encoder.fingerprint, split)
