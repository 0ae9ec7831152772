"""Texts to unit rows, in batches: what every evaluator of a dual encoder begins with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sycoca.types import DualEncoder


def embed_texts(subject: DualEncoder, texts: Sequence[str], *, batch_size: int) -> torch.Tensor:
    """NE float32 with unit norm, on the subject's device; without texts no rows, but of the subject's width."""
    batches = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    text_NE = torch.cat([subject.encode_text(batch) for batch in batches or [["a"]]])
    return F.normalize(text_NE[: len(texts)].float(), dim=-1)
