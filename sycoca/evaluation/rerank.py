"""Re-ranking: the candidates that cosines put first are ordered anew by how probable a captioner finds each caption.

score = cosine + weight * mean log p(token | tokens before it, image). Candidates stay above everything else.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sycoca.distributed import sum_over_ranks
from sycoca.evaluation.embedding import EmbeddedSet, embed_pairs
from sycoca.evaluation.retrieval import TIE, Ranks, recall_metrics, retrieval_ranks
from sycoca.types import DualEncoder


class CaptionRater(DualEncoder, Protocol):
    """A dual encoder that can also say how probable a caption is."""

    def encode_patches(self, image_BCHW: Tensor, /) -> Tensor:
        """BPD: what the decoder looks at."""
        ...

    def caption_log_prob(self, patch_NPD: Tensor, texts: list[str], /) -> Tensor:
        """N float32: the mean log-probability of a caption's tokens, given the patches of its row."""
        ...


class Candidates(NamedTuple):
    """The best by cosine of each row, best first: rows of the other side, and their scores (float64)."""

    row_NJ: Tensor
    score_NJ: Tensor


class RerankEvaluator:
    """Recall as RetrievalEvaluator gives it, and again as `reranked/...` with the first `num_candidates` of each row re-ranked.

    `load_batches` gives this rank's batches from the beginning, each time the same (dicts as RetrievalEvaluator takes them): a
    first pass embeds, a second rates the candidates of this rank's images; no patches are kept. The subject is in evaluation
    mode.
    """

    def __init__(
        self, load_batches: Callable[[], Iterable[Mapping[str, Any]]], *, num_candidates: int, weight: float,
        text_batch_size: int = 256, chunk: int = 128,
    ):  # fmt: skip
        self._load_batches, self._num_candidates, self._weight = load_batches, num_candidates, weight
        self._text_batch_size, self._chunk = text_batch_size, chunk

    @torch.no_grad()
    def __call__(self, subject: CaptionRater) -> dict[str, float]:
        """Percent and places by name; the same on every rank. Raises DataError for an empty set, a key that occurs twice, an
        image without captions."""
        known = embed_pairs(subject, self._load_batches(), text_batch_size=self._text_batch_size)
        ranks = retrieval_ranks(known.image_NE, known.text_NE, known.image_of_text_N, chunk=self._chunk)
        texts = self._best(known.image_NE, known.text_NE)
        images = self._best(known.text_NE, known.image_NE)
        log_prob_of_texts_NJ, log_prob_of_images_NJ = self._rate(subject, known, texts.row_NJ, images.row_NJ)
        row_N = torch.arange(len(known.image_NE), device=known.image_NE.device)
        reranked = Ranks(
            reranked_places(
                texts.score_NJ + self._weight * log_prob_of_texts_NJ,
                known.image_of_text_N[texts.row_NJ] == row_N[:, None], ranks.image_to_text_N,
            ),
            reranked_places(
                images.score_NJ + self._weight * log_prob_of_images_NJ,
                images.row_NJ == known.image_of_text_N[:, None], ranks.text_to_image_N,
            ),
        )  # fmt: skip
        return recall_metrics(ranks) | {f"reranked/{name}": value for name, value in recall_metrics(reranked).items()}

    def _best(self, query_NE: Tensor, other_NE: Tensor) -> Candidates:
        """In float64 and the same on every rank, so that neither the chunk's size nor the number of ranks shows."""
        num, other_NE = min(self._num_candidates, len(other_NE)), other_NE.double()
        best = [(rows_NE.double() @ other_NE.T).topk(num, dim=1) for rows_NE in query_NE.split(self._chunk)]
        return Candidates(torch.cat([part.indices for part in best]), torch.cat([part.values for part in best]))

    def _rate(self, subject: CaptionRater, known: EmbeddedSet, text_NJ: Tensor, image_NJ: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of each image's candidate texts and of each text given its candidate images, float64.

        Every rank rates the pairs of its own images, whose patches it has; each pair once.
        """
        for_texts_NJ = torch.zeros(text_NJ.shape, dtype=torch.float64, device=text_NJ.device)
        for_images_NJ = torch.zeros(image_NJ.shape, dtype=torch.float64, device=image_NJ.device)
        for batch in self._load_batches():
            patch_BPD = subject.encode_patches(batch["image"])
            for key, patch_PD in zip(batch["key"], patch_BPD, strict=True):
                row = known.row_of_image[key]
                asking_N, place_N = (image_NJ == row).nonzero(as_tuple=True)
                wanted_N, where_N = torch.cat([text_NJ[row], asking_N]).unique(return_inverse=True)
                texts = [known.texts[text] for text in wanted_N.tolist()]
                log_prob_N = self._log_prob(subject, patch_PD, texts).double()[where_N]
                for_texts_NJ[row] = log_prob_N[: text_NJ.shape[1]]
                for_images_NJ[asking_N, place_N] = log_prob_N[text_NJ.shape[1] :]
        return sum_over_ranks(for_texts_NJ), sum_over_ranks(for_images_NJ)

    def _log_prob(self, subject: CaptionRater, patch_PD: Tensor, texts: list[str]) -> Tensor:
        groups = [texts[start : start + self._text_batch_size] for start in range(0, len(texts), self._text_batch_size)]
        return torch.cat([subject.caption_log_prob(patch_PD.expand(len(group), -1, -1), group) for group in groups])


def reranked_places(score_NJ: Tensor, is_own_NJ: Tensor, place_N: Tensor) -> Tensor:
    """For each row the place, from 1, of its best own candidate by the new scores; `place_N` where none is its own.

    Ties go against the right answer, and so does NaN.
    """
    best_N1 = score_NJ.masked_fill(~is_own_NJ, -torch.inf).amax(1, keepdim=True)
    is_below_NJ = score_NJ < best_N1 - TIE
    new_N = 1 + (~is_below_NJ & ~is_own_NJ).sum(1)
    return torch.where(is_own_NJ.any(1), new_N, place_N)
