"""CLIP-S and RefCLIP-S: captions rated by a dual encoder, without and with references (Hessel et al., arXiv:2104.08718)."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sycoca.distributed import gather_objects
from sycoca.evaluation.caption_metrics import PERCENT, CaptionScores, mean_scores
from sycoca.evaluation.embedding import embed_texts
from sycoca.similarity import PROMPT, clip_s, ref_clip_s
from sycoca.types import DataError, DualEncoder


class ClipScoreEvaluator:
    """CLIP-S and RefCLIP-S of captions that are already written.

    `batches` is this rank's share, transformed as the encoder needs it: dicts with `image` (BCHW), `key` and `captions` (the
    references of each image); shares may be uneven or empty. The encoder moves pixels to its own device and is in evaluation
    mode. `prompt` goes around every caption; `{}` stands for it.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, prompt: str = PROMPT, text_batch_size: int = 256):
        self._batches = batches
        self._prompt = prompt
        self._text_batch_size = text_batch_size

    @torch.no_grad()
    def __call__(self, encoder: DualEncoder, predictions: Mapping[str, str]) -> CaptionScores:
        """Times 100, the same on every rank; the corpus's are means over images. Raises DataError for no images, an image
        without a prediction or without references, or a key that occurs twice."""
        own: list[tuple[str, dict[str, float]]] = []
        for batch in self._batches:
            own += self._rate(encoder, batch, predictions)
        rows = sorted((row for share in gather_objects(own) for row in share), key=lambda row: row[0])
        if not rows:
            raise DataError("CLIP-S: expected images, found none; check the shards")
        per_image = dict(rows)
        if len(per_image) < len(rows):
            twice = next(left for (left, _), (right, _) in pairwise(rows) if left == right)
            raise DataError(f"{twice}: two images of this name; CLIP-S needs each image once")
        return CaptionScores(mean_scores(per_image), per_image)

    def _rate(
        self, encoder: DualEncoder, batch: Mapping[str, Any], predictions: Mapping[str, str]
    ) -> list[tuple[str, dict[str, float]]]:
        for key, references in zip(batch["key"], batch["captions"], strict=True):
            if key not in predictions or not references:
                raise DataError(f"{key}: CLIP-S needs a prediction and references for each image")
        image_BE = encoder.encode_image(batch["image"])
        caption_BE = self._embed(encoder, [predictions[key] for key in batch["key"]])
        reference_NE = self._embed(encoder, [text for texts in batch["captions"] for text in texts])
        clip_s_B = clip_s(image_BE, caption_BE)
        ref_clip_s_B = ref_clip_s(clip_s_B, caption_BE, reference_NE.split([len(texts) for texts in batch["captions"]]))
        scores = zip(batch["key"], clip_s_B.tolist(), ref_clip_s_B.tolist(), strict=True)
        return [(key, {"CLIP-S": PERCENT * alone, "RefCLIP-S": PERCENT * referred}) for key, alone, referred in scores]

    def _embed(self, encoder: DualEncoder, captions: Sequence[str]) -> Tensor:
        texts = [self._prompt.replace("{}", caption) for caption in captions]
        return embed_texts(encoder, texts, batch_size=self._text_batch_size)
