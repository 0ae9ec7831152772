"""What CgT-GAN's captions are rewarded for: being near their image, by any scorer, and reading as if a person wrote them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sycoca.captioners.datastore import build_datastore
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner, load_aligner
from sycoca.captioners.score import AggregateScorer, AlignedAggregateScorer, AlignedScorer, ClipScorer, CosineScorer, Texts
from sycoca.captioners.text_rows import TextRows
from sycoca.captioners.transform import EmbeddingTransform
from sycoca.config import Config

Semantic = Literal["CLIP-cos", "CLIP-S", "aCLIP-S", "CLIP-agg", "aCLIP-agg"]
Rate = Callable[[Sequence[str], Tensor, Texts], Tensor]
"""Keys, raw image embeddings BE and J candidates of each to BJ."""


class RewardConfig(Config):
    """reward = rho * semantic_scale * semantic + (1 - rho) * natural, by the step's rho; the defaults are the paper's."""

    semantic: Semantic = "CLIP-agg"
    aligner: str | None = None
    """Of aCLIP-S and aCLIP-agg (tools/fit_aligner.py). It was fitted on pairs: training is then no longer without them."""
    temperature: float = Field(default=150.0, ge=0)
    """Of CLIP-agg: 100 to 175 in the paper, by pair of data sets."""
    cosine_share: float = Field(default=0.5, ge=0, le=1)
    """Of CLIP-agg: mu, the share of the cosine beside that of the mean difference."""
    semantic_scale: float = Field(default=1.0, gt=0)
    """The natural reward is a logit, of any size, and cosines of an image's captions differ by hundredths."""
    num_natural_steps: int = Field(default=150, ge=0)
    """Steps in which rho is 0."""
    full_step: int = Field(default=2500, ge=1)
    """The step at which rho reaches `rho`, after a linear rise."""
    rho: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "RewardConfig":
        needs_aligner = self.semantic in ("aCLIP-S", "aCLIP-agg")
        if needs_aligner != (self.aligner is not None):
            raise ValueError(f"aligner belongs to aCLIP-S and aCLIP-agg, which need one; found {self.semantic}, {self.aligner}")
        if self.full_step <= self.num_natural_steps:
            raise ValueError(f"full_step is {self.full_step}, expected more than num_natural_steps = {self.num_natural_steps}")
        return self

    def rho_at(self, step: int) -> float:
        """Weight of the semantic term in a step, counted from 1."""
        done = (step - self.num_natural_steps) / (self.full_step - self.num_natural_steps)
        return self.rho * min(1.0, max(0.0, done))


class AggregateReward:
    """CLIP-agg, with the target of each image made once: it reads the whole corpus."""

    def __init__(self, scorer: AggregateScorer):
        self._scorer = scorer
        self._target_of_key: dict[str, Tensor] = {}

    def __call__(self, keys: Sequence[str], image_BE: Tensor, candidates: Texts) -> Tensor:
        new = [row for row, key in enumerate(keys) if key not in self._target_of_key]
        if new:
            target_NE = self._scorer.targets(image_BE[new])
            self._target_of_key |= {keys[row]: target_E for row, target_E in zip(new, target_NE, strict=True)}
        return self._scorer.score_targets(torch.stack([self._target_of_key[key] for key in keys]), candidates)


def build_semantic(config: RewardConfig, encoder: FrozenEncoder, corpus: TextRows) -> Rate:
    """The semantic reward. Raises DataError for an aligner or corpus of another encoder."""
    shape = {"temperature": config.temperature, "cosine_share": config.cosine_share}
    match config.semantic:
        case "CLIP-agg":
            return AggregateReward(AggregateScorer(encoder, build_datastore(corpus, EmbeddingTransform()), **shape))
        case "aCLIP-agg":
            aligner = _load(config)
            datastore = build_datastore(corpus, aligner.target_transform)
            return AggregateReward(AlignedAggregateScorer(encoder, datastore, aligner, **shape))
        case "CLIP-cos":
            scorer = CosineScorer(encoder)
        case "CLIP-S":
            scorer = ClipScorer(encoder)
        case "aCLIP-S":
            scorer = AlignedScorer(encoder, _load(config))
    return lambda keys, image_BE, candidates: scorer(image_BE, candidates)


def _load(config: RewardConfig) -> LinearAligner:
    assert config.aligner is not None, "the configuration was checked"
    return load_aligner(Path(config.aligner))
