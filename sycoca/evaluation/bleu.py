"""BLEU-1 to 4 of tokenised captions (Papineni et al. 2002), as pycocoevalcap's BleuScorer computes it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_N = 4
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's: they make a precision of 0 / 0 nearly 0


class BleuCounts(NamedTuple):
    """What BLEU needs to know of one caption, or of a corpus; counts of n-grams for n = 1 to 4."""

    num_matched: tuple[int, ...]
    """N-grams of the candidate found in a reference, each at most as often as in the reference that has it most often."""
    num_written: tuple[int, ...]
    """N-grams of the candidate."""
    num_words: int
    num_reference_words: int
    """Of the reference nearest in length (`closest`); the shorter of two as near."""


def count_ngrams(caption: str) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n = 1 to 4; words are separated by white space."""
    words = caption.split()
    return [Counter(zip(*(words[start:] for start in range(n)))) for n in range(1, MAX_N + 1)]


def count_matches(candidate: str, references: Sequence[str]) -> BleuCounts:
    """Counts of one tokenised caption against its tokenised references, of which there is at least one."""
    written = count_ngrams(candidate)
    known = [count_ngrams(reference) for reference in references]
    num_words = written[0].total()
    lengths = [counts[0].total() for counts in known]
    matched = (
        sum((counts & _most_often(of_reference[n] for of_reference in known)).values()) for n, counts in enumerate(written)
    )
    nearest = min(lengths, key=lambda length: (abs(length - num_words), length))
    return BleuCounts(tuple(matched), tuple(counts.total() for counts in written), num_words, nearest)


def add_counts(rows: Sequence[BleuCounts]) -> BleuCounts:
    """The counts of a corpus."""
    matched, written, num_words, num_reference_words = zip(*rows, strict=True)
    return BleuCounts(_sum_columns(matched), _sum_columns(written), sum(num_words), sum(num_reference_words))


def bleu(counts: BleuCounts) -> list[float]:
    """BLEU-1 to 4 in [0, 1], of an image or of a corpus.

    The geometric mean of the precisions up to n, times exp(1 - r / c) where the candidate's length c is below the
    reference length r (Papineni et al. 2002, 2.3).
    """
    scores, product = [], 1.0
    for n, (num_matched, num_written) in enumerate(zip(counts.num_matched, counts.num_written, strict=True), start=1):
        product *= (num_matched + _TINY) / (num_written + _SMALL)
        scores.append(product ** (1 / n))
    ratio = (counts.num_words + _TINY) / (counts.num_reference_words + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [score * penalty for score in scores]


def _most_often(counters: Iterable[Counter[tuple[str, ...]]]) -> Counter[tuple[str, ...]]:
    union: Counter[tuple[str, ...]] = Counter()
    for counter in counters:
        union |= counter
    return union


def _sum_columns(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))
