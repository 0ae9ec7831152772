"""Scorers: (image embeddings, candidate texts) -> scores. One object chooses among candidates, filters, rewards and measures.

    CLIP-cos     cos(v, c)
    CLIP-S       2.5 max(cos(v, c), 0)                                  Hessel et al., arXiv 2104.08718
    RefCLIP-S    harmonic mean of CLIP-S and the best cosine to a reference
    aCLIP-S      max(cos((v - m_v) W, c - m_c), 0)                      ReCap: W and the means are an aligner's
    RefaCLIP-S   harmonic mean of aCLIP-S and the best cosine to a reference
    CLIP-agg     mu cos(a, c) + (1 - mu) (1 - mean |a - c|)             CgT-GAN: a = sum_j softmax_j(T cos(v, t_j)) t_j
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca.captioners.datastore import Datastore
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.similarity import PROMPT, clip_s, harmonic_mean, nearest_reference, positive_cosine
from sycoca.types import ConfigError, DataError

Texts = Sequence[Sequence[str]]
"""Some texts for each image."""


class Scorer(Protocol):
    """Rates candidate texts; more is better."""

    @property
    def name(self) -> str:
        """What the score is called."""
        ...

    @property
    def needs_references(self) -> bool:
        """Whether it compares with texts that people wrote."""
        ...

    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        """BJ float32, without graph: J candidates an image, raw image embeddings, any number of references an image.

        Raises DataError where images have different numbers of candidates, or references are needed and missing.
        """
        ...


class ClipScorer:
    """CLIP-S."""

    name, needs_references = "CLIP-S", False

    def __init__(self, encoder: FrozenEncoder, *, prompt: str = PROMPT):
        self._encoder, self._prompt = encoder, prompt

    @torch.no_grad()
    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        caption_NE = _encode(self._encoder, _flatten(image_BE, candidates), self._prompt)
        return clip_s(_repeat(image_BE, candidates), caption_NE).view(len(candidates), -1)


class CosineScorer:
    """CLIP-cos, of the caption as it is: CgT-GAN's simpler reward."""

    name, needs_references = "CLIP-cos", False

    def __init__(self, encoder: FrozenEncoder):
        self._encoder = encoder

    @torch.no_grad()
    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        caption_NE = self._encoder.encode_text(_flatten(image_BE, candidates))
        image_NE = _repeat(image_BE, candidates).to(caption_NE)
        return F.cosine_similarity(image_NE, caption_NE, dim=-1).view(len(candidates), -1)


class RefClipScorer:
    """RefCLIP-S."""

    name, needs_references = "RefCLIP-S", True

    def __init__(self, encoder: FrozenEncoder, *, prompt: str = PROMPT):
        self._encoder, self._prompt = encoder, prompt

    @torch.no_grad()
    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        caption_NE = _encode(self._encoder, _flatten(image_BE, candidates), self._prompt)
        alone_N = clip_s(_repeat(image_BE, candidates), caption_NE)
        nearest_N = _nearest(self._encoder, caption_NE, candidates, references, prompt=self._prompt)
        return harmonic_mean(alone_N, nearest_N).view(len(candidates), -1)


class AlignedScorer:
    """aCLIP-S. Raises DataError for an aligner of another encoder."""

    name, needs_references = "aCLIP-S", False

    def __init__(self, encoder: FrozenEncoder, aligner: LinearAligner):
        aligner.check_spaces(source=encoder.fingerprint, target=encoder.fingerprint)
        self._encoder, self._aligner = encoder, aligner

    @torch.no_grad()
    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        caption_NE = self._encoder.encode_text(_flatten(image_BE, candidates))
        return _aligned(self._aligner, image_BE, candidates, caption_NE).view(len(candidates), -1)


class RefAlignedScorer(AlignedScorer):
    """RefaCLIP-S; references are compared by raw text embeddings. Raises DataError for an aligner of another encoder."""

    name, needs_references = "RefaCLIP-S", True

    @torch.no_grad()
    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        caption_NE = self._encoder.encode_text(_flatten(image_BE, candidates))
        alone_N = _aligned(self._aligner, image_BE, candidates, caption_NE)
        nearest_N = _nearest(self._encoder, caption_NE, candidates, references, prompt="{}")
        return harmonic_mean(alone_N, nearest_N).view(len(candidates), -1)


class AggregateScorer:
    """CLIP-agg over a datastore's corpus. Raises DataError for a datastore of another encoder, ConfigError for a bad number."""

    name, needs_references = "CLIP-agg", False

    def __init__(self, encoder: FrozenEncoder, datastore: Datastore, *, temperature: float, cosine_share: float = 0.5):
        datastore.check_encoder(encoder.fingerprint)
        if not 0 <= cosine_share <= 1:
            raise ConfigError(f"cosine_share: expected a share in [0, 1], found {cosine_share}")
        self._encoder, self._datastore = encoder, datastore
        self._temperature, self._cosine_share = temperature, cosine_share

    def targets(self, image_BE: Tensor) -> Tensor:
        """BE: what captions of each image are compared with; it reads the whole corpus, so keep it for images seen again."""
        return self._datastore.aggregate(image_BE, self._temperature)

    def __call__(self, image_BE: Tensor, candidates: Texts, references: Texts = (), /) -> Tensor:
        return self.score_targets(self.targets(image_BE), candidates)

    @torch.no_grad()
    def score_targets(self, target_BE: Tensor, candidates: Texts) -> Tensor:
        """BJ, from what `targets` gave."""
        caption_NE = self._datastore.transform(self._encoder.encode_text(_flatten(target_BE, candidates)))
        target_NE = _repeat(target_BE, candidates).to(caption_NE)
        near_N = 1 - (target_NE - caption_NE).abs().mean(dim=-1)
        score_N = self._cosine_share * F.cosine_similarity(target_NE, caption_NE, dim=-1) + (1 - self._cosine_share) * near_N
        return score_N.view(len(candidates), -1)


class AlignedAggregateScorer(AggregateScorer):
    """CLIP-agg in the space of an aligner: images are mapped there, and the corpus lies there too.

    Raises DataError for a datastore that was not built with the aligner.
    """

    name = "aCLIP-agg"

    def __init__(
        self, encoder: FrozenEncoder, datastore: Datastore, aligner: LinearAligner, *, temperature: float,
        cosine_share: float = 0.5,
    ):  # fmt: skip
        super().__init__(encoder, datastore, temperature=temperature, cosine_share=cosine_share)
        aligner.check_spaces(source=encoder.fingerprint, target=encoder.fingerprint)
        datastore.check_aligner(aligner)
        self._aligner = aligner

    def targets(self, image_BE: Tensor) -> Tensor:
        """BE, in the aligned space."""
        return super().targets(self._aligner.apply(image_BE))


def _flatten(image_BE: Tensor, candidates: Texts) -> list[str]:
    numbers = {len(texts) for texts in candidates}
    if len(candidates) != len(image_BE) or len(numbers) != 1 or 0 in numbers:
        found = [len(texts) for texts in candidates]
        raise DataError(f"expected the same number of candidates for each of {len(image_BE)} images, found {found}")
    return [text for texts in candidates for text in texts]


def _repeat(image_BE: Tensor, candidates: Texts) -> Tensor:
    return image_BE.repeat_interleave(len(candidates[0]), dim=0)


def _encode(encoder: FrozenEncoder, texts: Sequence[str], prompt: str) -> Tensor:
    return encoder.encode_text([prompt.replace("{}", text) for text in texts])


def _aligned(aligner: LinearAligner, image_BE: Tensor, candidates: Texts, caption_NE: Tensor) -> Tensor:
    image_NF = _repeat(aligner.apply(image_BE), candidates)
    return positive_cosine(image_NF.to(caption_NE), aligner.embed_target(caption_NE))


def _nearest(encoder: FrozenEncoder, caption_NE: Tensor, candidates: Texts, references: Texts, *, prompt: str) -> Tensor:
    if len(references) != len(candidates) or not all(references):
        raise DataError("this score compares with references: expected at least one for each image")
    flat_NE = _encode(encoder, [text for texts in references for text in texts], prompt)
    of_image = flat_NE.split([len(texts) for texts in references])
    return nearest_reference(caption_NE, [rows for rows in of_image for _ in candidates[0]])
