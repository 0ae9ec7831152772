"""ROUGE-L of tokenised captions (Lin 2004), as pycocoevalcap computes it."""

from collections.abc import Sequence

BETA = 1.2
"""Weight of recall against precision; pycocoevalcap's."""


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F-measure in [0, 1] of the longest common subsequence: the best precision and the best recall over the references.

    (1 + b^2) P R / (R + b^2 P) (Lin 2004, equation 4). Words are separated by single spaces; of an empty caption it is the
    one word "", so that two empty captions agree, as in the official scorer.
    """
    words = candidate.split(" ")
    rows = [reference.split(" ") for reference in references]
    common = [_common_length(words, row) for row in rows]
    precision = max(common) / len(words)
    recall = max(length / len(row) for length, row in zip(common, rows, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_length(left: list[str], right: list[str]) -> int:
    """Words in the longest common subsequence."""
    lengths = [0] * (len(right) + 1)  # of left's words so far with right's first 0, 1, ... words
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
