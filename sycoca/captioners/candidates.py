"""Candidate captions of a frozen language model, and the best of each image's."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sycoca.captioners.captioner import Written
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.prompt import pad_prompts
from sycoca.captioners.score import AlignedScorer, ClipScorer, Scorer
from sycoca.generation import GenerationConfig

PROMPT_ROWS = 64
"""Prompts that the language model continues at a time."""

Choice = Literal["likelihood", "CLIP-S", "aCLIP-S"]
"""What the best candidate has most of: the language model's own score, or an encoder's."""


class Candidates(NamedTuple):
    """J texts an image, with the language model's score of each (`generation.Generated.score_NJ`)."""

    texts: list[list[str]]
    score_BJ: Tensor


def write_candidates(
    lm: CaptionLM, prompts: Sequence[Sequence[list[int]]], generation: GenerationConfig, *, seed: int
) -> Candidates:
    """Continue every prompt of every image, all with equally many: J is that number times `generation.num_return`.

    `seed` is of sampling, in which what an image gets depends on the images beside it.
    """
    rows = [ids for of_image in prompts for ids in of_image]
    generator = torch.Generator(lm.device).manual_seed(seed)
    texts: list[str] = []
    scores = [torch.zeros(0)]
    for start in range(0, len(rows), PROMPT_ROWS):
        batch = pad_prompts(rows[start : start + PROMPT_ROWS], lm.pad)
        written = lm.generate(batch, generation, generator=generator)
        texts += [text for of_row in lm.decode_texts(written) for text in of_row]
        scores.append(written.score_NJ.flatten().float().cpu())
    num = len(texts) // max(1, len(prompts))
    return Candidates([texts[at : at + num] for at in range(0, len(texts), num or 1)], torch.cat(scores).view(len(prompts), -1))


def build_scorer(choice: Choice, encoder: FrozenEncoder, aligner: LinearAligner | None) -> Scorer | None:
    """The scorer that a choice names; None is the language model itself. Raises DataError for an aligner of another encoder."""
    match choice:
        case "likelihood":
            return None
        case "CLIP-S":
            return ClipScorer(encoder)
        case "aCLIP-S":
            assert aligner is not None, "aCLIP-S needs an aligner"
            return AlignedScorer(encoder, aligner)


def choose(
    candidates: Candidates, retrieved: Sequence[list[str]], image_BE: Tensor, scorer: Scorer | None
) -> list[Written]:
    """The candidate of the highest score of each image, the first of equals, with everything that led to it."""
    score_BJ = candidates.score_BJ if scorer is None else scorer(image_BE, candidates.texts).cpu()
    best_B = score_BJ.argmax(dim=1).tolist() if len(retrieved) else []
    return [
        Written(texts[best], items, texts, score_J)
        for texts, items, best, score_J in zip(candidates.texts, retrieved, best_B, score_BJ.tolist(), strict=True)
    ]
