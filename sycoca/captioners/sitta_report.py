"""How well a map finds the words of an image: NDCG of the ranked vocabulary against the stems of its captions' words."""

import numpy as np
from numpy.typing import NDArray

from sycoca.captioners.embeddings import Pairs
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.sitta_maps import MapName, TokenMapConfig, fit_token_map
from sycoca.captioners.stem import stem
from sycoca.captioners.token_vocabulary import TokenVocabulary
from sycoca.captioners.words import content_words
from sycoca.types import DataError

NAMES: tuple[MapName, ...] = ("external", "lexical", "shuffled", "random")


def compare_maps(
    encoder: FrozenEncoder, train: Pairs, held_out: Pairs, vocabulary: TokenVocabulary, config: TokenMapConfig
) -> dict[str, float]:
    """`token_ndcg` on held-out images of every map, the controls too, fitted as `config` says but for the name."""
    found = {}
    for name in NAMES:
        aligner = fit_token_map(encoder, train, vocabulary, config.model_copy(update={"name": name}))
        found[name] = token_ndcg(aligner, vocabulary, held_out)
    return found


def token_ndcg(aligner: LinearAligner, vocabulary: TokenVocabulary, pairs: Pairs) -> float:
    """Mean in [0, 1] over the images of whose captions the vocabulary has a word. Raises DataError where there is none.

    The whole vocabulary is ranked, each different word at its best token; a word is relevant (gain 1) where its stem is one
    of a content word of the image's captions.
    """
    stems = [stem(word) for word in vocabulary.different_words]
    scores = []
    for block in pairs.blocks():
        wanted: list[set[str]] = [set() for _ in block.keys]
        for text, image in zip(block.texts, block.image_of_text_N.tolist(), strict=True):
            wanted[image].update(map(stem, content_words(text)))
        row_BN = vocabulary.rank_rows(aligner.apply(block.image_NE))
        for word_N, of_image in zip(vocabulary.word_of_row_N[row_BN].numpy(), wanted, strict=True):
            is_relevant = np.array([name in of_image for name in stems])
            if is_relevant.any():
                scores.append(ndcg(is_relevant[first_of_each(word_N)]))
    if not scores:
        raise DataError(f"NDCG: the language model has no word of the captions of the split {pairs.split!r}")
    return float(np.mean(scores))


def first_of_each(word_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different numbers in the order in which each first occurs."""
    _, first = np.unique(word_N, return_index=True)
    return word_N[np.sort(first)]


def ndcg(is_relevant_N: NDArray[np.bool_]) -> float:
    """Of a ranking with gains 0 and 1: sum of 1 / log2(rank + 1) over the relevant, over the most that it could be."""
    discount_N = 1 / np.log2(np.arange(2, len(is_relevant_N) + 2))
    return float(discount_N[is_relevant_N].sum() / discount_N[: is_relevant_N.sum()].sum())
