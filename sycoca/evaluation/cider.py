"""CIDEr of tokenised captions as pycocoevalcap computes it: the paper's CIDEr-D (Vedantam et al., arXiv:1411.5726, section 4).

Document frequencies are given once, so that a CiderScorer rates any number of candidates: also a reward.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from sycoca.evaluation.bleu import MAX_N, count_ngrams
from sycoca.types import DataError

SIGMA = 6.0
"""Of the penalty on a difference in length, in words."""
SCALE = 10.0
_NUM_KEPT = 4096  # images whose references are kept ready

Ngram = tuple[str, ...]


class DocumentFrequencies(NamedTuple):
    """In how many images' references an n-gram occurs, of `num_images`. Those in one image only are left out: as absent
    ones they count as 1."""

    num_images: int
    num_images_with: Mapping[Ngram, int]


class _Vector(NamedTuple):
    """A caption's weights tf * idf, by n from 0."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    num_bigrams: int


class _References(NamedTuple):
    """An image's references: norms and lengths by reference, weights by n-gram with the number of the reference."""

    norms: list[list[float]]
    num_bigrams: list[int]
    weights: list[dict[Ngram, list[tuple[int, float]]]]


def count_documents(references: Iterable[Sequence[str]]) -> DocumentFrequencies:
    """Document frequencies of a corpus: for each image, its tokenised references."""
    num_images, counts = 0, Counter[Ngram]()
    for captions in references:
        num_images += 1
        counts.update(set(chain.from_iterable(chain.from_iterable(map(count_ngrams, captions)))))
    return DocumentFrequencies(num_images, {ngram: count for ngram, count in counts.items() if count > 1})


class CiderScorer:
    """Rates candidates against the tokenised references of `references[key]`.

    `frequencies` come from these references, or from a corpus that is given. In a corpus of one image every n-gram weighs
    log(1) = 0, and so does every score. Raises DataError for no images, or an image without references.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], *, frequencies: DocumentFrequencies | None = None):
        for key, captions in references.items():
            if not captions:
                raise DataError(f"{key}: an image without references; CIDEr needs at least one for each image")
        self._references = references
        num_images, num_images_with = frequencies or count_documents(references.values())
        if num_images == 0:
            raise DataError("CIDEr: expected images with references, found none")
        self._idf_of_rare = math.log(num_images)
        self._idf = {ngram: self._idf_of_rare - math.log(num) for ngram, num in num_images_with.items()}
        self._prepared = lru_cache(maxsize=_NUM_KEPT)(self._prepare)

    def score(self, candidate: str, key: str) -> float:
        """CIDEr in [0, 10] of a tokenised caption of the image `key`.

        10 / 4 * sum over n, mean over references, of exp(-(l_c - l_r)^2 / (2 sigma^2)) * min(g_c, g_r) . g_r / (|g_c| |g_r|),
        with g the weights of n-grams tf * log(N / df) (equations 4 to 6), and lengths l in bigrams, as pycocoevalcap counts.
        """
        vector, references = self._weigh(candidate), self._prepared(key)
        num_references = len(references.num_bigrams)
        totals = [0.0] * num_references
        for n in range(MAX_N):
            products = [0.0] * num_references
            for ngram, weight in vector.weights[n].items():
                for number, other in references.weights[n].get(ngram, ()):
                    products[number] += min(weight, other) * other
            for number, product in enumerate(products):
                if product:  # then neither norm is 0
                    totals[number] += product / (vector.norms[n] * references.norms[number][n])
        penalties = (
            math.exp(-((vector.num_bigrams - num_bigrams) ** 2) / (2 * SIGMA**2)) for num_bigrams in references.num_bigrams
        )
        total = sum(total * penalty for total, penalty in zip(totals, penalties, strict=True))
        return SCALE * total / (MAX_N * num_references)

    def _weigh(self, caption: str) -> _Vector:
        counts, idf, of_rare = count_ngrams(caption), self._idf, self._idf_of_rare
        weights = [{ngram: count * idf.get(ngram, of_rare) for ngram, count in of_n.items()} for of_n in counts]
        norms = [math.sqrt(sum(weight**2 for weight in of_n.values())) for of_n in weights]
        return _Vector(weights, norms, counts[1].total())

    def _prepare(self, key: str) -> _References:
        vectors = [self._weigh(reference) for reference in self._references[key]]
        weights: list[dict[Ngram, list[tuple[int, float]]]] = [defaultdict(list) for _ in range(MAX_N)]
        for number, vector in enumerate(vectors):
            for of_n, of_vector in zip(weights, vector.weights, strict=True):
                for ngram, weight in of_vector.items():
                    of_n[ngram].append((number, weight))
        return _References([vector.norms for vector in vectors], [vector.num_bigrams for vector in vectors], weights)
