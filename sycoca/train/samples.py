"""What the model makes of held-out pairs, as a picture: relevance, masked input, reconstruction, the caption it writes."""

import json
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.transforms import denormalise
from sycoca.distributed import rank
from sycoca.generation import GenerationConfig
from sycoca.models.image_decoder import patchify, unpatchify
from sycoca.models.masking import gather_patches
from sycoca.objectives.masked_image import VARIANCE_FLOOR, MaskedImageObjective
from sycoca.pretrained import Pretrained
from sycoca.train.task import PretrainTask, precision
from sycoca.train.validation import EvaluateConfig, held_out
from sycoca.types import Batch

HIDDEN_GREY = 0.55
CAPTION_WIDTH = 26
"""Characters a line under the pictures."""


class SampleWriter:
    """Writes `step_N.png` and `step_N.json` for the first held-out pairs. Every rank must call it; rank 0 writes."""

    def __init__(self, task: PretrainTask, subject: Pretrained, config: EvaluateConfig, data: DataConfig, folder: Path):
        self.task, self.subject, self.folder, self.transform = task, subject, folder, data.transform
        loader = build_eval_loader(held_out(config, data), rank=0, world_size=1, batch_size=max(1, config.num_samples))
        [self.pairs] = islice(loader, 1)

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        was_training = self.task.training
        self.task.eval()
        references = [captions[0] for captions in self.pairs["captions"]]
        with precision(self.subject.device, is_bf16=self.task.is_bf16):
            columns = draw_columns(self.task, self.subject, self.pairs["image"], references)
            written = self._captions()
        self.task.train(was_training)
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = [
                {"key": key, "caption": caption, "reference": reference}
                for key, caption, reference in zip(self.pairs["key"], written, references, strict=True)
            ]
            path = self.folder / f"step_{step:08d}.json"
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            columns = {name: self._as_picture(image) for name, image in columns.items()}
            draw_samples(columns, rows, path.with_suffix(".png"))

    def _captions(self) -> list[str]:
        if "text_decoder" not in self.subject.model.parts:
            return ["" for _ in self.pairs["key"]]
        # all ranks look at the same images and so take the same number of steps, which ZeRO-3 needs
        return self.subject.caption(self.pairs["image"], generation=GenerationConfig(max_tokens=40))

    def _as_picture(self, image_BCHW: Tensor) -> Tensor:
        if image_BCHW.shape[1] == 1:
            return image_BCHW.float().cpu()
        return denormalise(image_BCHW.float().cpu(), self.transform).clamp(0, 1)


def draw_columns(task: PretrainTask, subject: Pretrained, image_BCHW: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """Pictures by column: the image; relevance (one channel); the masked input and its reconstruction (BCHW, normalised)."""
    batch, _ = subject.encode(image_BCHW, texts)
    features = task.encode(batch)
    columns = {"image": batch["image"]}
    if features.relevance_BP is not None:
        columns["relevance to the caption"] = unpatchify(features.relevance_BP[..., None], 1)
    members = [member for member in task.members().values() if isinstance(member, MaskedImageObjective)]
    for member in members[:1]:
        masked_BK, visible_BK = member.split(features)
        pixel_BKX = member.reconstruct(task.model, batch, features, masked_BK, visible_BK).float()
        columns["masked input"] = paste(batch, torch.full_like(pixel_BKX, torch.nan), masked_BK, task.model.vision.patch_size)
        if member.config.norm_pixels:
            pixel_BKX = unnormalise_patches(pixel_BKX, batch, masked_BK, task.model.vision.patch_size)
        columns["reconstruction"] = paste(batch, pixel_BKX, masked_BK, task.model.vision.patch_size)
    return columns


def paste(batch: Batch, pixel_BKX: Tensor, place_BK: Tensor, patch_size: int) -> Tensor:
    """BCHW: the images with these patches in place of their own."""
    own_BPX = patchify(batch["image"], patch_size)
    return unpatchify(own_BPX.scatter(1, place_BK[..., None].expand_as(pixel_BKX), pixel_BKX.to(own_BPX.dtype)), patch_size)


def unnormalise_patches(pixel_BKX: Tensor, batch: Batch, place_BK: Tensor, patch_size: int) -> Tensor:
    """Give predicted patches the true patch's mean and deviation, as MAE's figures do: the model predicts neither."""
    true_BKX = gather_patches(patchify(batch["image"], patch_size), place_BK)
    variance, mean = torch.var_mean(true_BKX, dim=-1, keepdim=True)
    return pixel_BKX * (variance + VARIANCE_FLOOR).sqrt() + mean


def draw_samples(columns: dict[str, Tensor], rows: list[dict[str, Any]], path: Path) -> None:
    """One row a pair: the pictures, then what was written and the reference."""
    from matplotlib.figure import Figure  # slow to import, and most processes draw nothing

    num_rows, num_columns = len(rows), len(columns) + 1
    figure = Figure(figsize=(2.1 * num_columns + 1.2, 2.0 * num_rows + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, width_ratios=[1] * len(columns) + [1.5])
    for column, (name, picture_BCHW) in enumerate(columns.items()):
        for row in range(num_rows):
            axis = axes[row, column]
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=10)
            _show(axis, picture_BCHW[row], columns["image"][row])
    for row, texts in enumerate(rows):
        axis = axes[row, -1]
        axis.set_axis_off()
        for place, label, colour in ((0.97, "caption", "black"), (0.45, "reference", "0.45")):
            text = "\n".join(textwrap.wrap(texts[label], CAPTION_WIDTH)[:4])
            axis.text(0, place, f"{label}:\n{text}", fontsize=9, va="top", color=colour, transform=axis.transAxes)
    figure.savefig(path)


def _show(axis: Any, picture_CHW: Tensor, image_CHW: Tensor) -> None:
    picture_HWC = picture_CHW.permute(1, 2, 0).float()
    if picture_CHW.shape[0] == 1:
        side = image_CHW.shape[-1]
        axis.imshow(image_CHW.permute(1, 2, 0).mean(dim=-1), cmap="gray", vmin=0, vmax=1.6, extent=(0, side, side, 0))
        axis.imshow(picture_HWC[..., 0], cmap="inferno", alpha=0.65, extent=(0, side, side, 0))
        return
    axis.imshow(picture_HWC.nan_to_num(HIDDEN_GREY), interpolation="nearest")
