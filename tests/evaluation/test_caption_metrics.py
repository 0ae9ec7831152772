"""BLEU, ROUGE-L and CIDEr against the official scores, plain loops and hand-made cases."""

import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from sycoca.evaluation.bleu import bleu, count_matches
from sycoca.evaluation.caption_metrics import CaptionScores, merge_scores, score_captions, score_tokenized
from sycoca.evaluation.cider import CiderScorer, count_documents
from sycoca.evaluation.rouge import rouge_l
from sycoca.types import DataError

OFFICIAL = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "caption_metrics"
needs_official = pytest.mark.skipif(not OFFICIAL.exists(), reason="no real data at SYCOCA_DATA")
OUR_NAMES = {**{f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}, "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
TOLERANCE = 1e-10
"""In percent; the worst seen is 2e-13."""


def random_set(seed: int, num_images: int = 7) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions of 0 to 9 words out of 6, so that n-grams recur; 1 to 4 references an image."""
    draw = random.Random(seed)

    def caption(shortest: int) -> str:
        return " ".join(draw.choices(["a", "dog", "runs", "on", "red", "sand"], k=draw.randint(shortest, 9)))

    predictions = {f"image{number}": caption(0) for number in range(num_images)}
    return predictions, {key: [caption(1) for _ in range(draw.randint(1, 4))] for key in predictions}


def ngrams(caption: str, n: int) -> list[tuple[str, ...]]:
    words = caption.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def bleu_by_loop(predictions: list[str], references: list[list[str]], n: int) -> float:
    log_precision, length, nearest = 0.0, 0, 0
    for size in range(1, n + 1):
        matched = written = 0
        for caption, known in zip(predictions, references):
            found = ngrams(caption, size)
            written += len(found)
            for ngram in set(found):
                matched += min(found.count(ngram), max(ngrams(reference, size).count(ngram) for reference in known))
        log_precision += math.log((matched + 1e-15) / (written + 1e-9)) / n
    for caption, known in zip(predictions, references):
        num_words = len(caption.split())
        length += num_words
        nearest += sorted((abs(len(text.split()) - num_words), len(text.split())) for text in known)[0][1]
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return math.exp(log_precision + min(0.0, 1 - 1 / ratio))


def cider_by_loop(candidate: str, references: list[str], corpus: list[list[str]]) -> float:
    def weights(caption: str, n: int) -> dict[tuple[str, ...], float]:
        counts = Counter(ngrams(caption, n))
        df = {ngram: sum(any(ngram in ngrams(text, n) for text in texts) for texts in corpus) for ngram in counts}
        return {ngram: times * math.log(len(corpus) / max(1, df[ngram])) for ngram, times in counts.items()}

    total = 0.0
    for reference in references:
        for n in range(1, 5):
            left, right = weights(candidate, n), weights(reference, n)
            norms = math.hypot(*left.values()) * math.hypot(*right.values())
            product = sum(min(left[ngram], right[ngram]) * right[ngram] for ngram in left.keys() & right.keys())
            difference = len(ngrams(candidate, 2)) - len(ngrams(reference, 2))
            total += math.exp(-(difference**2) / 72) * product / norms if norms else 0.0
    return 10 * total / 4 / len(references)


def common_length(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return 0
    if left[0] == right[0]:
        return 1 + common_length(left[1:], right[1:])
    return max(common_length(left[1:], right), common_length(left, right[1:]))


@needs_official
@pytest.mark.parametrize("path", sorted(OFFICIAL.glob("*.json")), ids=lambda path: path.stem[:30])
def test_scores_of_words_are_the_official_scores(path: Path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    references = dict(zip(stored["ids"], stored["refs_tok"], strict=True))
    found = score_tokenized(dict(zip(stored["ids"], stored["hyp_tok"], strict=True)), references)
    official = stored.get("scores") or stored["printed_scores"]
    for name, ours in OUR_NAMES.items():
        assert found.corpus[ours] == pytest.approx(100 * official[name], abs=TOLERANCE)
    for name, scores in stored.get("per_image", {}).items():
        if name in OUR_NAMES:
            ours = [found.per_image[key][OUR_NAMES[name]] for key in stored["ids"]]
            assert ours == pytest.approx([100 * score for score in scores], abs=TOLERANCE)


@needs_official
def test_scores_of_raw_captions_are_the_official_scores():
    stored = json.loads((OFFICIAL / "f30k_test_procrustes_1.0_mscoco.json").read_text(encoding="utf-8"))
    found = score_captions(dict(zip(stored["ids"], stored["hyp"])), dict(zip(stored["ids"], stored["refs"])))
    for name, ours in OUR_NAMES.items():
        assert found.corpus[ours] == pytest.approx(100 * stored["scores"][name], abs=TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_every_metric_equals_a_plain_loop(seed: int):
    predictions, references = random_set(seed)
    found = score_tokenized(predictions, references)
    corpus = list(references.values())
    assert found.corpus["BLEU-4"] == pytest.approx(100 * bleu_by_loop(list(predictions.values()), corpus, 4))
    assert found.corpus["BLEU-2"] == pytest.approx(100 * bleu_by_loop(list(predictions.values()), corpus, 2))
    for key, candidate in predictions.items():
        scores = found.per_image[key]
        assert scores["BLEU-3"] == pytest.approx(100 * bleu_by_loop([candidate], [references[key]], 3))
        assert scores["CIDEr"] == pytest.approx(100 * cider_by_loop(candidate, references[key], corpus))
    assert found.corpus["CIDEr"] == pytest.approx(sum(row["CIDEr"] for row in found.per_image.values()) / len(predictions))
    assert 0 < found.corpus["CIDEr"] < 1000


@pytest.mark.parametrize("seed", range(4))
def test_rouge_takes_the_best_precision_and_the_best_recall_of_any_reference(seed: int):
    predictions, references = random_set(seed)
    for key, candidate in predictions.items():
        words = candidate.split(" ")
        lengths = [common_length(words, text.split(" ")) for text in references[key]]
        precision = max(lengths) / len(words)
        recall = max(length / len(text.split(" ")) for length, text in zip(lengths, references[key]))
        expected = 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0
        assert rouge_l(candidate, references[key]) == pytest.approx(expected)


def test_bleu_of_a_caption_by_hand():
    counts = count_matches("the the the cat", ["the cat sat", "the the dog sat down"])
    assert counts.num_matched == (3, 2, 0, 0)  # "the" twice at most, "cat"; "the the" once, "the cat"
    assert counts.num_written == (4, 3, 2, 1)
    assert (counts.num_words, counts.num_reference_words) == (4, 3)  # 3 and 5 are as near: the shorter
    assert bleu(counts)[:2] == pytest.approx([3 / 4, math.sqrt(3 / 4 * 2 / 3)])
    short = count_matches("the cat", ["the cat sat on it"])
    assert bleu(short)[0] == pytest.approx(math.exp(1 - 5 / 2))


def test_cider_weighs_by_what_is_rare_and_clips_what_is_repeated():
    references = {"x": ["a red dog"], "y": ["a blue cat"], "z": ["a cat"]}
    scorer = CiderScorer(references)
    assert scorer.score("a red dog", "x") == pytest.approx(7.5)  # 10 for each n but 4, of which there are none
    assert scorer.score("a a a", "x") == 0.0  # "a" is everywhere and says nothing
    assert 0 < scorer.score("dog dog dog", "x") < scorer.score("red dog dog", "x") < scorer.score("a red dog", "x")
    assert scorer.score("", "x") == 0.0


@pytest.mark.parametrize("references", [{}, {"x": []}])
def test_cider_needs_references(references: dict):
    with pytest.raises(DataError, match="references"):
        CiderScorer(references)


@pytest.mark.parametrize("seed", range(2))
def test_document_frequencies_may_come_from_another_corpus(seed: int):
    predictions, references = random_set(seed)
    _, others = random_set(seed + 10, num_images=11)
    found = score_tokenized(predictions, references, frequencies=count_documents(others.values()))
    for key, candidate in predictions.items():
        expected = cider_by_loop(candidate, references[key], list(others.values()))
        assert found.per_image[key]["CIDEr"] == pytest.approx(100 * expected)
    assert found.corpus["CIDEr"] != pytest.approx(score_tokenized(predictions, references).corpus["CIDEr"])


def test_a_perfect_caption_has_full_marks_and_an_unrelated_one_none():
    references = {"x": ["a red dog runs on sand"], "y": ["two people sit at the table"]}
    perfect = score_captions({"x": "A red dog runs on sand.", "y": "Two people, sit at the table"}, references).corpus
    assert perfect == pytest.approx({"BLEU-1": 100, "BLEU-2": 100, "BLEU-3": 100, "BLEU-4": 100, "ROUGE-L": 100, "CIDEr": 1000})
    unrelated = score_captions({"x": "my green bus", "y": ""}, references).corpus
    assert unrelated == pytest.approx(dict.fromkeys(perfect, 0.0), abs=1e-9)


def test_the_order_of_the_images_never_changes_a_score():
    predictions, references = random_set(5, num_images=40)
    backwards = score_tokenized(dict(reversed(predictions.items())), dict(reversed(references.items())))
    assert backwards == score_tokenized(predictions, references)


def test_references_of_other_images_are_not_read():
    predictions, references = random_set(3)
    assert score_tokenized(predictions, {**references, "other": ["a dog"]}) == score_tokenized(predictions, references)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {"x": ["a"]}, "found none"),
        ({"x": "a", "y": "b"}, {"x": ["a"]}, "y: a prediction without references"),
        ({"x": "a"}, {"x": []}, "x: a prediction without references"),
    ],
)
def test_sets_that_cannot_be_scored_are_refused(predictions: dict, references: dict, message: str):
    with pytest.raises(DataError, match=message):
        score_captions(predictions, references)


def test_merged_scores_have_the_metrics_of_all_parts():
    left, right = CaptionScores({"a": 1}, {"x": {"a": 1}}), CaptionScores({"b": 2}, {"x": {"b": 2}}, {"c": "none"})
    assert merge_scores(left, right) == CaptionScores({"a": 1, "b": 2}, {"x": {"a": 1, "b": 2}}, {"c": "none"})
