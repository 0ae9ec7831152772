"""Every score against a plain loop in float64."""

import math

import pytest
import torch
from compass import build_compass, spell
from torch import Tensor

from sycoca.captioners.candidates import Candidates, choose
from sycoca.captioners.datastore import build_datastore
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.score import (
    AggregateScorer,
    AlignedAggregateScorer,
    AlignedScorer,
    ClipScorer,
    RefAlignedScorer,
    RefClipScorer,
)
from sycoca.captioners.text_rows import Row, TextRows
from sycoca.captioners.transform import EmbeddingTransform, fit_transform
from sycoca.types import ConfigError, DataError

B, J, E, S = 2, 4, 3, 9
NUM_REFERENCES = (2, 1)
Vector = list[float]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(1e6).round().div(1e6)


IMAGE_BE, CAPTION_BJE = noise(B, E, seed=1), noise(B, J, E, seed=2)
REFERENCES = [noise(num, E, seed=3 + num) for num in NUM_REFERENCES]
CANDIDATES = [[spell(row) for row in rows] for rows in CAPTION_BJE]
REFERENCE_TEXTS = [[spell(row) for row in rows] for rows in REFERENCES]
CORPUS_SE = noise(S, E, seed=8)


def cosine(left: Vector, right: Vector) -> float:
    norms = math.sqrt(sum(a * a for a in left)) * math.sqrt(sum(b * b for b in right))
    return sum(a * b for a, b in zip(left, right, strict=True)) / norms


def harmonic(left: float, right: float) -> float:
    return 2 * left * right / (left + right) if left + right else 0.0


def expected(rate) -> Tensor:
    """BJ of `rate(image, caption, references)` in float64."""
    rows = [
        [rate(image, caption, references.double().tolist()) for caption in captions]
        for image, captions, references in zip(IMAGE_BE.double().tolist(), CAPTION_BJE.double().tolist(), REFERENCES)
    ]
    return torch.tensor(rows)


def build_aligner(fingerprint: str) -> LinearAligner:
    image, text = (fit_transform(["l2", "centre"], lambda seed=seed: [noise(20, E, seed=seed) + 1]) for seed in (11, 12))
    return LinearAligner(noise(E, E, seed=13), image, text, fingerprint, fingerprint, "ols", 20)


def centred(row: Vector, transform: EmbeddingTransform) -> Vector:
    length, shift = math.sqrt(sum(value * value for value in row)), transform.steps[1].shift_E
    assert shift is not None
    return [value / length - mean for value, mean in zip(row, shift.tolist())]


def mapped(image: Vector, aligner: LinearAligner) -> Vector:
    source = centred(image, aligner.source_transform)
    return [sum(source[i] * aligner.weight_EF[i, j].item() for i in range(E)) for j in range(E)]


def aligned(image: Vector, caption: Vector, aligner: LinearAligner) -> float:
    return max(cosine(mapped(image, aligner), centred(caption, aligner.target_transform)), 0.0)


def aggregated(image: Vector, caption: Vector, rows: list[Vector], *, temperature: float, share: float) -> float:
    weights = [math.exp(temperature * (cosine(image, row) - 1)) for row in rows]
    target = [sum(w * row[i] for w, row in zip(weights, rows)) / sum(weights) for i in range(E)]
    distance = sum(abs(a - b) for a, b in zip(target, caption)) / E
    return share * cosine(target, caption) + (1 - share) * (1 - distance)


def test_clip_s_is_the_plain_formula():
    scores = ClipScorer(build_compass())(IMAGE_BE, CANDIDATES)
    torch.testing.assert_close(scores, expected(lambda image, caption, _: 2.5 * max(cosine(image, caption), 0.0)))
    assert (scores == 0).any() and (scores > 0).any()


def test_ref_clip_s_is_the_plain_formula():
    def rate(image: Vector, caption: Vector, references: list[Vector]) -> float:
        nearest = max(max(cosine(caption, reference) for reference in references), 0.0)
        return harmonic(2.5 * max(cosine(image, caption), 0.0), nearest)

    torch.testing.assert_close(RefClipScorer(build_compass())(IMAGE_BE, CANDIDATES, REFERENCE_TEXTS), expected(rate))


def test_the_prompt_goes_before_candidates_and_references(monkeypatch: pytest.MonkeyPatch):
    encoder, seen = build_compass(), []
    encode = encoder.encode_text
    monkeypatch.setattr(encoder, "encode_text", lambda texts: (seen.extend(texts), encode(texts))[1])
    RefClipScorer(encoder)(IMAGE_BE, CANDIDATES, REFERENCE_TEXTS)
    assert len(seen) == B * J + sum(NUM_REFERENCES)
    assert all(text.startswith("A photo depicts ") for text in seen)


def test_aclip_s_and_refaclip_s_are_the_plain_formulas():
    encoder = build_compass()
    aligner = build_aligner(encoder.fingerprint)
    alone = expected(lambda image, caption, _: aligned(image, caption, aligner))
    torch.testing.assert_close(AlignedScorer(encoder, aligner)(IMAGE_BE, CANDIDATES), alone)

    def rate(image: Vector, caption: Vector, references: list[Vector]) -> float:
        nearest = max(max(cosine(caption, reference) for reference in references), 0.0)
        return harmonic(aligned(image, caption, aligner), nearest)

    torch.testing.assert_close(RefAlignedScorer(encoder, aligner)(IMAGE_BE, CANDIDATES, REFERENCE_TEXTS), expected(rate))


@pytest.mark.parametrize(("temperature", "share"), [(0.0, 0.5), (12.0, 0.5), (150.0, 0.2), (12.0, 1.0)])
def test_clip_agg_is_the_plain_formula(temperature: float, share: float):
    encoder = build_compass()
    corpus = TextRows([Row(str(row), "") for row in range(S)], CORPUS_SE.numpy(), encoder.fingerprint)
    datastore = build_datastore(corpus, EmbeddingTransform())
    scorer = AggregateScorer(encoder, datastore, temperature=temperature, cosine_share=share)

    def rate(image: Vector, caption: Vector, _: list[Vector]) -> float:
        return aggregated(image, caption, CORPUS_SE.double().tolist(), temperature=temperature, share=share)

    torch.testing.assert_close(scorer(IMAGE_BE, CANDIDATES), expected(rate), rtol=1e-4, atol=1e-5)
    assert torch.equal(scorer.score_targets(scorer.targets(IMAGE_BE), CANDIDATES), scorer(IMAGE_BE, CANDIDATES))


@pytest.mark.parametrize(("temperature", "share"), [(0.0, 0.5), (12.0, 0.3)])
def test_clip_agg_in_the_aligned_space_is_the_plain_formula_of_what_the_aligner_gives(temperature: float, share: float):
    encoder = build_compass()
    aligner = build_aligner(encoder.fingerprint)
    corpus = TextRows([Row(str(row), "") for row in range(S)], CORPUS_SE.numpy(), encoder.fingerprint)
    datastore = build_datastore(corpus, aligner.target_transform)
    scorer = AlignedAggregateScorer(encoder, datastore, aligner, temperature=temperature, cosine_share=share)
    rows = [centred(row, aligner.target_transform) for row in CORPUS_SE.double().tolist()]

    def rate(image: Vector, caption: Vector, _: list[Vector]) -> float:
        target = centred(caption, aligner.target_transform)
        return aggregated(mapped(image, aligner), target, rows, temperature=temperature, share=share)

    torch.testing.assert_close(scorer(IMAGE_BE, CANDIDATES), expected(rate), rtol=1e-4, atol=1e-5)


def test_the_best_candidate_is_chosen_and_scores_carry_no_graph():
    scorer = ClipScorer(build_compass())
    scores = scorer(IMAGE_BE.clone().requires_grad_(), CANDIDATES)
    assert not scores.requires_grad
    written = choose(Candidates(CANDIDATES, torch.zeros_like(scores)), [[]] * B, IMAGE_BE, scorer)
    assert [one.caption for one in written] == [CANDIDATES[image][scores[image].argmax()] for image in range(B)]


def test_bad_candidates_references_and_parts_are_refused():
    encoder = build_compass()
    for candidates in ([["1 2 3"], ["1 2 3", "3 2 1"]], [["1 2 3"]], [[], []]):
        with pytest.raises(DataError, match="same number of candidates for each of 2 images"):
            ClipScorer(encoder)(IMAGE_BE, candidates)
    for references in ((), [["1 2 3"], []]):
        with pytest.raises(DataError, match="at least one for each image"):
            RefClipScorer(encoder)(IMAGE_BE, CANDIDATES, references)
    for scorer in (AlignedScorer, RefAlignedScorer):
        with pytest.raises(DataError, match="do not belong together"):
            scorer(encoder, build_aligner("another"))
    corpus = build_datastore(TextRows([Row("", "")], CORPUS_SE[:1].numpy(), "another"), EmbeddingTransform())
    with pytest.raises(DataError, match="do not belong together"):
        AggregateScorer(encoder, corpus, temperature=1.0)
    corpus.fingerprint = encoder.fingerprint
    with pytest.raises(ConfigError, match="a share"):
        AggregateScorer(encoder, corpus, temperature=1.0, cosine_share=1.5)
