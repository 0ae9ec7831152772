"""A checkpoint's TG-MIM as something to measure: the error with which it rebuilds patches under guidance of any text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor

from sycoca.config import parse_config
from sycoca.models.masking import gather_patches
from sycoca.objectives.masked_image import MaskedImageConfig, patch_targets
from sycoca.pretrained import Pretrained, find_checkpoint
from sycoca.types import CheckpointError


class TextGuidedReconstruction:
    """The image decoder of a checkpoint; masks are attentive here even if it was trained on random ones."""

    def __init__(self, subject: Pretrained, config: MaskedImageConfig):
        if not config.text_guided:
            raise CheckpointError("this checkpoint's tg_mim has text_guided: false; no text can help it")
        self.subject, self.config = subject, config
        self.objective = config.model_copy(update={"mask": "top"}).build()

    @torch.no_grad()
    def reconstruction_error(
        self, images: Sequence[Image.Image], mask_texts: Sequence[str], guide_texts: Sequence[str]
    ) -> Tensor:
        """B: error on the patches that `mask_texts` are most about, rebuilt from the others and `guide_texts`."""
        model = self.subject.model
        score_BP = self.subject.relevance(images, mask_texts)
        batch, features = self.subject.encode(images, guide_texts)
        masked_BK, visible_BK = self.objective.split(replace(features, relevance_BP=score_BP))
        pixel_BKX = self.objective.reconstruct(model, batch, features, masked_BK, visible_BK)
        target_BPX = patch_targets(batch["image"], model.vision.patch_size, self.config.norm_pixels)
        error_BKX = pixel_BKX.float() - gather_patches(target_BPX, masked_BK)
        return (error_BKX.square() if self.config.loss == "l2" else error_BKX.abs()).mean(dim=(1, 2))


def read_masked_image_config(path: Path) -> MaskedImageConfig | None:
    """The first objective of type tg_mim in the configuration of a checkpoint or run folder; None where it has none."""
    file = find_checkpoint(path) / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it says how the image decoder was trained; copy it from the run's folder")
    objectives = yaml.safe_load(file.read_text(encoding="utf-8"))["objectives"].values()
    found = [tree for tree in objectives if tree["type"] == "tg_mim"]
    return parse_config(MaskedImageConfig, found[0], source=f"{file}: objectives") if found else None
