"""Image-text contrast over all ranks (ITC)."""

import hashlib
import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.distributed import gather_rows, rank
from sycoca.models.sycoca import SyCoCa
from sycoca.objectives.base import Objective, ObjectiveConfig
from sycoca.objectives.chunked_contrast import chunked_info_nce, is_same_name
from sycoca.types import Batch, Features, Metrics, image_of

MAX_LOGIT_SCALE = 100.0
"""CLIP, section 2.5."""


class ContrastiveConfig(ObjectiveConfig):
    """ITC; both directions are averaged, as in CLIP (CoCa's paper sums them)."""

    type: Literal["itc"] = "itc"
    init_temperature: float = 0.07
    mask_duplicates: bool = False
    """Leave pairs out of the negatives that share this pair's caption or image key."""
    chunk_rows: int = Field(default=0, ge=0)
    """Rows of similarities alive at a time; 0 is all of this rank's. The same loss and gradients, for very large batches."""

    def build(self) -> "ContrastiveObjective":
        return ContrastiveObjective(self)


class ContrastiveObjective(Objective):
    """InfoNCE over all ranks, this rank's rows only; its mean over ranks is the loss of the whole batch (SyCoCa, L_ITC)."""

    needs = frozenset({"text", "contrast"})
    is_separable = False

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        # one number in a vector: DeepSpeed cannot broadcast a parameter without dimensions
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.init_temperature)]))

    def forward(self, model: SyCoCa, batch: Batch, features: Features) -> tuple[Tensor, Metrics]:
        image_BE, text_BE = features.image_BE, features.text_BE
        assert image_BE is not None and text_BE is not None
        image_GE, text_GE = gather_rows(image_BE), gather_rows(text_BE)
        # clamped here and not after the step: DeepSpeed's float32 master copy would overwrite a clamp of the parameter
        scale = self.log_logit_scale.float().clamp(max=math.log(MAX_LOGIT_SCALE)).exp().squeeze()
        names = None
        if self.config.mask_duplicates:
            name_B2 = pair_names(batch)
            names = name_B2, gather_rows(name_B2)
        with torch.autocast(image_BE.device.type, enabled=False):
            if self.config.chunk_rows:
                directions = (image_BE, text_GE), (text_BE, image_GE)
                results = [chunked_info_nce(*pair, scale, rows=self.config.chunk_rows, names=names) for pair in directions]
                loss, accuracy = (torch.stack(values).mean() for values in zip(*results, strict=True))
            else:
                is_same_BG = None if names is None else is_same_name(*names)
                loss, accuracy = info_nce(scale * image_BE @ text_GE.T, scale * text_BE @ image_GE.T, is_same_BG)
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "logit_scale": scale.detach()}


def info_nce(to_text_BG: Tensor, to_image_BG: Tensor, is_same_BG: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of both directions' cross-entropy against this rank's diagonal, and the share of rows whose best is right."""
    num_rows = to_text_BG.shape[0]
    target_B = torch.arange(num_rows, device=to_text_BG.device) + rank() * num_rows
    if is_same_BG is not None:
        is_negative = is_same_BG.scatter(1, target_B[:, None], False)
        to_text_BG, to_image_BG = (x.masked_fill(is_negative, -torch.inf) for x in (to_text_BG, to_image_BG))
    loss = (F.cross_entropy(to_text_BG, target_B) + F.cross_entropy(to_image_BG, target_B)) / 2
    hits = [(x.argmax(dim=1) == target_B).float().mean() for x in (to_text_BG, to_image_BG)]
    return loss, torch.stack(hits).mean()


def pair_names(batch: Batch) -> Tensor:
    """B2: hashes of each pair's caption and of its image, the key up to a `#`, which numbers an image's captions."""
    lengths = batch["length"].tolist()
    captions = [str(row[:n]) for row, n in zip(batch["token"].tolist(), lengths, strict=True)]
    images = [image_of(key) for key in batch["key"]]
    name_B2 = torch.tensor([[_hash(c), _hash(i)] for c, i in zip(captions, images, strict=True)])
    return name_B2.to(batch["token"].device)


def _hash(text: str) -> int:
    """63 bits, the same in every process (Python's own hash of text is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
