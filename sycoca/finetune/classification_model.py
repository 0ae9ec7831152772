"""The network of image classification: the image encoder, a pool over its patches, and a linear head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.config import Config
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.train.task import precision
from sycoca.types import Batch, Metrics

ImagePool = Literal["embedding", "max", "mean", "cls"]
"""`embedding`: the raw image embedding, pooled as in pretraining, after the projection into the space shared with texts.
The others pool the encoder's output before it: the maximum or mean over patches, or the class token."""


class ClassBatch(Batch):
    """Images with their classes."""

    target: Tensor
    """B int64: places in the list of classes."""


class MixConfig(Config):
    """What training images and their classes are mixed with (timm's Mixup; MAE: mixup 0.8, cutmix 1.0, smoothing 0.1)."""

    mixup: float = Field(default=0.0, ge=0)
    """Both parameters of the Beta distribution of mixup's share; 0 is off."""
    cutmix: float = Field(default=0.0, ge=0)
    """The same for CutMix."""
    mix_share: float = Field(default=1.0, ge=0, le=1)
    """Of the batches, those that are mixed."""
    cutmix_share: float = Field(default=0.5, ge=0, le=1)
    """Of the mixed batches, those mixed by CutMix, where both are on."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @property
    def is_mixing(self) -> bool:
        """Whether images are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


class ImageClassifier(nn.Module):
    """Cross-entropy of the classes; with mixing, against the mixed classes' shares."""

    def __init__(
        self, model: SyCoCa, head: nn.Module, *, pool: ImagePool, mix: MixConfig, num_classes: int, is_bf16: bool = False
    ):
        super().__init__()
        self.model, self.head, self.is_bf16 = model, head, is_bf16
        self.pool: ImagePool = pool
        self.label_smoothing = mix.label_smoothing
        self.mix_images = build_mixup(mix, num_classes) if mix.is_mixing else None
        if model.text_projection is not None:
            model.text_projection.requires_grad_(False)  # comes with the image's projection, and nothing reads text here

    def forward(self, batch: ClassBatch) -> tuple[Tensor, Metrics]:
        """The loss of this rank's images; where nothing is mixed, also the share whose most probable class is right."""
        image_BCHW, target_B = batch["image"], batch["target"]
        is_mixed = self.training and self.mix_images is not None
        if is_mixed and self.mix_images is not None:
            with numpy_drawing_from_torch():
                image_BCHW, target_B = self.mix_images(image_BCHW.clone(), target_B)  # it mixes in place
        with precision(image_BCHW.device, is_bf16=self.is_bf16, is_recomputed=self.model.config.recompute):
            logit_BN = self.logits(image_BCHW)
        if is_mixed:
            loss = SoftTargetCrossEntropy()(logit_BN, target_B)
            return loss, {"loss": loss.detach()}
        loss = F.cross_entropy(logit_BN, target_B, label_smoothing=self.label_smoothing)
        return loss, {"loss": loss.detach(), "accuracy": (logit_BN.argmax(1) == target_B).float().mean()}

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """BN float32."""
        return self.head(pool_image(self.model, image_BCHW, self.pool)).float()


def classification_parts(pool: ImagePool) -> frozenset[Part]:
    """The parts of a model that a pool needs besides the image encoder."""
    return frozenset({"contrast"}) if pool == "embedding" else frozenset()


def pooled_width(model: SyCoCa, pool: ImagePool) -> int:
    """Width of `pool_image`'s rows."""
    return model.config.embed_width if pool == "embedding" else model.vision.width


def pool_image(model: SyCoCa, image_BCHW: Tensor, pool: ImagePool) -> Tensor:
    """BE or BD: one vector an image."""
    patch_BPD, class_BD = model.vision(image_BCHW)
    match pool:
        case "embedding":
            return model.project_image(patch_BPD, class_BD)
        case "max":
            return patch_BPD.amax(dim=1)
        case "mean":
            return patch_BPD.mean(dim=1)
        case "cls":
            return class_BD


def build_mixup(mix: MixConfig, num_classes: int) -> Mixup:
    """timm's Mixup: one share for the whole batch, `(BCHW, B) -> (BCHW, BN)`; for an even number of images."""
    return Mixup(
        mixup_alpha=mix.mixup, cutmix_alpha=mix.cutmix, prob=mix.mix_share, switch_prob=mix.cutmix_share, mode="batch",
        label_smoothing=mix.label_smoothing, num_classes=num_classes,
    )  # fmt: skip


@contextmanager
def numpy_drawing_from_torch() -> Iterator[None]:
    """Seeds numpy's global generator, that timm draws from, by torch's, which checkpoints keep for every rank: so draws differ
    between ranks and steps and go on as before after a resume. numpy's state is left as it was."""
    state = np.random.get_state()
    np.random.seed(int(torch.randint(2**32, ())))
    try:
        yield
    finally:
        np.random.set_state(state)


def count_hits(logit_BN: Tensor, target_B: Tensor) -> Tensor:
    """(3, N) int64 by class: its images, and those with the right class first and among the first five; ties and NaN go
    against it."""
    right_B1 = logit_BN.gather(1, target_B[:, None])
    place_B = (~(logit_BN < right_B1)).sum(1)  # the right class itself is not below itself, and is the 1
    hit_3B = torch.stack([torch.ones_like(place_B), place_B <= 1, place_B <= 5])
    count_3N = torch.zeros((3, logit_BN.shape[1]), dtype=torch.int64, device=logit_BN.device)
    return count_3N.index_add_(1, target_B, hit_3B.long())
