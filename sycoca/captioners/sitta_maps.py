"""SITTA's maps from images to a language model's input embeddings, in closed form (arXiv 2307.05591v1, section 3).

External: the image's embedding to the tokens of its captions' content words. Lexical: the text tower's embedding of each token
to that token; it sees no pair, and works as far as images and texts share their space.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sycoca.captioners.aligner import Method, PairBlock, fit_map
from sycoca.captioners.alignment import derange
from sycoca.captioners.embeddings import Pairs
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.token_vocabulary import TokenVocabulary
from sycoca.captioners.transform import EmbeddingTransform, Kind, fit_transform
from sycoca.captioners.words import content_words
from sycoca.config import Config

MapName = Literal["external", "lexical", "shuffled", "random"]
"""`shuffled`, external of shuffled pairs, and `random`, a matrix of noise, are controls."""


class TokenMapConfig(Config):
    """How images are mapped to tokens; the defaults are SITTA's."""

    name: MapName = "external"
    method: Method = "ols"
    ridge: float = Field(default=1.0, gt=0)
    """Penalty of `ridge`, as scikit-learn's."""
    image_transform: list[Kind] = ["zscore"]
    token_transform: list[Kind] = ["zscore"]
    """Of the vocabulary; `whiten` where words of a kind lie so near each other that only their kind is found."""
    words: Literal["vocabulary", "captions"] = "vocabulary"
    """What may be found: every token, or those that are content words of training captions, whichever image's. For language
    models of few words, many of which stand in prompts alone."""
    templates: list[str] | Literal["openai"] = "openai"
    """Of the lexical map: prompts around each token, `{}` stands for it; `openai` are CLIP's 80 of ImageNet."""
    image_statistics: Literal["images", "texts"] = "images"
    """Of the lexical map: what standardises images, unlabelled training images or, where there are none at all, its texts."""
    seed: int = 0
    """Of the controls."""

    def prompts(self) -> list[str]:
        """The templates, each with `{}` once."""
        if self.templates == "openai":
            import open_clip  # slow to import, and few ask for it

            return [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return list(self.templates)


def build_vocabulary(lm: CaptionLM, train: Pairs, config: TokenMapConfig) -> TokenVocabulary:
    """The words that may be found. Raises DataError where the language model has none of them."""
    texts = (text for block in train.blocks() for text in block.texts) if config.words == "captions" else None
    allowed = None if texts is None else {word for text in texts for word in content_words(text)}
    return TokenVocabulary(lm, allowed=allowed, kinds=config.token_transform)


def fit_token_map(
    encoder: FrozenEncoder, train: Pairs, vocabulary: TokenVocabulary, config: TokenMapConfig
) -> LinearAligner:
    """The map that is named. Raises DataError for pairs without captions, ConfigError for an unknown transform."""
    image_transform = fit_transform(config.image_transform, lambda: (block.image_NE for block in train.blocks()))
    match config.name:
        case "external" | "shuffled":
            order = derange(len(train), config.seed) if config.name == "shuffled" else None
            read = partial(
                read_token_pairs, train, vocabulary, image_transform, order=order, is_summed=config.method != "robust"
            )
            weight_EF = fit_map(read, config.method, ridge=config.ridge)
        case "lexical":
            text_NE = embed_words(encoder, vocabulary, config.prompts())
            text_transform = fit_transform(config.image_transform, lambda: [text_NE])
            pairs = PairBlock(text_transform(text_NE.double()), vocabulary.embedding_NF)
            weight_EF = fit_map(lambda: [pairs], config.method, ridge=config.ridge)
            image_transform = image_transform if config.image_statistics == "images" else text_transform
        case "random":
            generator = torch.Generator().manual_seed(config.seed)
            sizes = (train.image_rows([0]).shape[1], vocabulary.embedding_NF.shape[1])
            weight_EF = torch.randn(sizes, generator=generator, dtype=torch.float64)
    return LinearAligner(
        weight_EF, image_transform, vocabulary.transform, source_fingerprint=train.fingerprint,
        target_fingerprint=vocabulary.fingerprint, method=f"{config.name} {config.method}",
        num_pairs=len(vocabulary.ids) if config.name == "lexical" else train.num_texts,
    )  # fmt: skip


def read_token_pairs(
    train: Pairs, vocabulary: TokenVocabulary, image_transform: EmbeddingTransform, *, order: Sequence[int] | None,
    is_summed: bool,
) -> Iterator[PairBlock]:  # fmt: skip
    """Each image with the tokens of its captions' content words, in blocks; `order[i]` is the image that stands in for i.

    Summed: one row an image, with its number of tokens; else one row a token.
    """
    start = 0
    for block in train.blocks():
        num = len(block.keys)
        image_NE = block.image_NE if order is None else train.image_rows(order[start : start + num])
        rows = rows_of_images(block.texts, block.image_of_text_N, num, vocabulary)
        owner_N = torch.tensor([image for image, of_image in enumerate(rows) for _ in of_image], dtype=torch.int64)
        token_NF = vocabulary.embedding_NF[[row for of_image in rows for row in of_image]].double()
        source_NE = image_transform(image_NE.double())
        if is_summed:
            sum_NF = token_NF.new_zeros(num, token_NF.shape[1]).index_add_(0, owner_N, token_NF)
            yield PairBlock(source_NE, sum_NF, owner_N.bincount(minlength=num))
        else:
            yield PairBlock(source_NE[owner_N], token_NF)
        start += num


def rows_of_images(
    texts: Sequence[str], image_of_text_N: Tensor, num_images: int, vocabulary: TokenVocabulary
) -> list[list[int]]:
    """Rows of the vocabulary for each image: the tokens of the different content words of all its captions, each once."""
    words: list[dict[str, None]] = [{} for _ in range(num_images)]
    for text, image in zip(texts, image_of_text_N.tolist(), strict=True):
        words[image].update(dict.fromkeys(content_words(text)))
    known: dict[str, list[int]] = {}
    for word in {word for of_image in words for word in of_image}:
        known[word] = vocabulary.rows_of(word)
    return [list(dict.fromkeys(row for word in of_image for row in known[word])) for of_image in words]


def embed_words(encoder: FrozenEncoder, vocabulary: TokenVocabulary, templates: Sequence[str]) -> Tensor:
    """NE: of each token the mean embedding of its word in every template, unit vectors before they are averaged."""
    words = vocabulary.different_words
    sum_NE = torch.zeros(len(words), encoder.embed_width)
    for template in templates:
        text_NE = encoder.encode_text([template.replace("{}", word) for word in words]).cpu()
        sum_NE += torch.nn.functional.normalize(text_NE, dim=-1)
    return (sum_NE / len(templates))[vocabulary.word_of_row_N]
