"""BLEU, ROUGE-L and CIDEr of captions, without Java: what pycocoevalcap gives for the same captions.

Scores are those of the official tool times 100, the scale that papers print: CIDEr may reach 1000, the others 100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sycoca.evaluation.bleu import MAX_N, add_counts, bleu, count_matches
from sycoca.evaluation.cider import CiderScorer, DocumentFrequencies
from sycoca.evaluation.ptb_tokenizer import tokenize_caption
from sycoca.evaluation.rouge import rouge_l
from sycoca.types import DataError

PERCENT = 100.0
_BLEU_NAMES = tuple(f"BLEU-{n}" for n in range(1, MAX_N + 1))


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Scores by metric, of the whole set and of each image by key; and metrics that are not there, with the reason."""

    corpus: dict[str, float]
    per_image: dict[str, dict[str, float]]
    absent: dict[str, str] = field(default_factory=dict)


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
) -> CaptionScores:
    """BLEU-1 to 4, ROUGE-L and CIDEr of raw captions; references of other images than the predicted ones are not read.

    BLEU of the corpus is not the mean over its images; ROUGE-L and CIDEr are. CIDEr's document frequencies are those of the
    evaluated references unless `frequencies` of another corpus are given. Raises DataError for no predictions at all, and
    for a prediction without references.
    """
    return score_tokenized(*tokenize_captions(predictions, references), frequencies=frequencies)


def tokenize_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Both in words, for the predicted images. Raises DataError as score_captions does."""
    _check(predictions, references)
    tokenized = {key: [tokenize_caption(caption) for caption in references[key]] for key in predictions}
    return {key: tokenize_caption(caption) for key, caption in predictions.items()}, tokenized


def score_tokenized(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
) -> CaptionScores:
    """As score_captions, of captions that are words separated by single spaces."""
    _check(predictions, references)
    keys = sorted(predictions)  # sums must not depend on the order in which ranks give their captions
    references = {key: references[key] for key in keys}
    cider = CiderScorer(references, frequencies=frequencies)
    counts = {key: count_matches(predictions[key], references[key]) for key in keys}
    per_image = {
        key: {
            **_in_percent(bleu(counts[key])),
            "ROUGE-L": PERCENT * rouge_l(predictions[key], references[key]),
            "CIDEr": PERCENT * cider.score(predictions[key], key),
        }
        for key in keys
    }
    means = mean_scores(per_image)
    corpus = _in_percent(bleu(add_counts(list(counts.values()))))
    return CaptionScores({**means, **corpus}, per_image)


def mean_scores(per_image: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over images of each metric; every image has the same ones, and there is an image."""
    names = next(iter(per_image.values()))
    return {name: sum(scores[name] for scores in per_image.values()) / len(per_image) for name in names}


def merge_scores(*parts: CaptionScores) -> CaptionScores:
    """The metrics of all parts together."""
    keys = dict.fromkeys(key for part in parts for key in part.per_image)
    return CaptionScores(
        {name: score for part in parts for name, score in part.corpus.items()},
        {key: {name: score for part in parts for name, score in part.per_image.get(key, {}).items()} for key in keys},
        {name: reason for part in parts for name, reason in part.absent.items()},
    )


def _in_percent(scores: Sequence[float]) -> dict[str, float]:
    return {name: PERCENT * score for name, score in zip(_BLEU_NAMES, scores, strict=True)}


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not predictions:
        raise DataError("expected captions to score, found none")
    lost = [key for key in predictions if not references.get(key)]
    if lost:
        raise DataError(
            f"{lost[0]}: a prediction without references ({len(lost)} of {len(predictions)} have none); "
            "give the references of the same images, named in the same way"
        )
