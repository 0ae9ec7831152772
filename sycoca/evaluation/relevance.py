"""Attentive masking against the truth: does relevance find the objects that a caption names, and does TG-MIM use its text?

For data whose object masks are known, such as the embedded scenes: a sample's `.mask.png` is 0 on background and n + 1 on
`objects[n]`; its json has `captions` and `caption_objects`, for each caption the numbers of the objects it names.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from webdataset.compat import WebDataset

from sycoca.data.decode import IMAGE_EXTENSIONS
from sycoca.data.shards import expand_shards
from sycoca.distributed import gather_uneven_rows
from sycoca.types import DataError

OBJECT_SHARE = 0.25
"""A patch is an object's if the object covers at least this share of it; background is covered by none; others are left out."""


class Relevant(Protocol):
    """Says how much each text speaks of each patch of its image, BP; P is a square number of patches."""

    def relevance(self, images: list[Image.Image], texts: list[str], /) -> Tensor: ...


class Reconstructor(Protocol):
    """Hides the patches that `mask_texts` are most about and rebuilds them with the help of `guide_texts`; the error, B."""

    def reconstruction_error(self, images: list[Image.Image], mask_texts: list[str], guide_texts: list[str], /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """A square image with its objects' places and what each caption names."""

    key: str
    image: Image.Image
    number_HW: Tensor
    """uint8: 0 on background, n + 1 on object n."""
    captions: list[str]
    caption_objects: list[list[int]]


class PatchKinds(NamedTuple):
    """Which patches show what, each BP; patches that are partly covered are none of the three."""

    is_named_BP: Tensor
    is_unnamed_BP: Tensor
    is_background_BP: Tensor


class RelevanceEvaluator:
    """AUC of relevance, averaged over the (image, caption) pairs that have patches of both kinds.

    `named_vs_background` is 1 where every patch of a named object scores above every patch of background, and 0.5 by chance;
    so for `unnamed_vs_background`, which only a relevance that finds objects as such lifts, and `named_vs_unnamed`, which
    only one that reads the caption does. `scenes` is this rank's share.
    """

    def __init__(self, scenes: Sequence[AnnotatedImage], *, batch_size: int = 64):
        self._scenes, self._batch_size = scenes, batch_size

    @torch.no_grad()
    def __call__(self, subject: Relevant) -> dict[str, float]:
        """The three AUCs and how many pairs each is the mean of; the same on every rank. Raises DataError without pairs."""
        pairs = [(scene, number) for scene in self._scenes for number in range(len(scene.captions))]
        rows = [self._score(subject, pairs[i : i + self._batch_size]) for i in range(0, len(pairs), self._batch_size)]
        auc_N3 = gather_uneven_rows(torch.cat(rows) if rows else torch.zeros(0, 3, dtype=torch.float64))
        if len(auc_N3) == 0:
            raise DataError("relevance: expected images with captions and masks, found none; check the shards")
        metrics: dict[str, float] = {}
        for name, auc_N in zip(("named_vs_background", "unnamed_vs_background", "named_vs_unnamed"), auc_N3.T, strict=True):
            metrics[name] = auc_N.nanmean().item()
            metrics[f"{name}/num_pairs"] = float((~auc_N.isnan()).sum())
        return metrics

    def _score(self, subject: Relevant, pairs: Sequence[tuple[AnnotatedImage, int]]) -> Tensor:
        texts = [scene.captions[number] for scene, number in pairs]
        score_BP = subject.relevance([scene.image for scene, _ in pairs], texts).double().cpu()
        grid = round(score_BP.shape[1] ** 0.5)
        kinds = [patch_kinds(scene.number_HW, scene.caption_objects[number], grid=grid) for scene, number in pairs]
        named, unnamed, background = (torch.stack(column) for column in zip(*kinds, strict=True))
        return torch.stack(
            [
                area_under_curve(score_BP, named, background),
                area_under_curve(score_BP, unnamed, background),
                area_under_curve(score_BP, named, unnamed),
            ],
            dim=1,
        )


class ReconstructionEvaluator:
    """Error on masked patches with the image's own caption, with another image's, and with none.

    Each image with its first caption. The mask is that of the own caption each time, so that only the guidance differs.
    """

    def __init__(self, scenes: Sequence[AnnotatedImage], *, batch_size: int = 64):
        self._scenes, self._batch_size = scenes, batch_size

    @torch.no_grad()
    def __call__(self, subject: Reconstructor) -> dict[str, float]:
        """Mean errors; what the own caption saves over the others, `gain`, and the gains' standard errors."""
        rows = [self._measure(subject, start) for start in range(0, len(self._scenes), self._batch_size)]
        error_N3 = gather_uneven_rows(torch.cat(rows) if rows else torch.zeros(0, 3, dtype=torch.float64))
        if len(error_N3) < 2:
            raise DataError("reconstruction: expected at least two images with captions, found fewer; check the shards")
        own_N, other_N, none_N = error_N3.unbind(1)
        metrics = {f"error/{name}": x.mean().item() for name, x in zip(("own", "other", "none"), error_N3.T, strict=True)}
        for name, gain_N in (("over_other", other_N - own_N), ("over_none", none_N - own_N)):
            metrics[f"gain/{name}"] = gain_N.mean().item()
            metrics[f"gain/{name}_standard_error"] = gain_N.std().item() / len(gain_N) ** 0.5
        return {**metrics, "num_images": float(len(error_N3))}

    def _measure(self, subject: Reconstructor, start: int) -> Tensor:
        batch = slice(start, start + self._batch_size)
        images = [scene.image for scene in self._scenes[batch]]
        own = [scene.captions[0] for scene in self._scenes]
        guides = (own[batch], shift_by_one(own)[batch], ["" for _ in images])
        return torch.stack([subject.reconstruction_error(images, own[batch], g).double().cpu() for g in guides], dim=1)


def read_annotated(shards: list[str]) -> Iterator[AnnotatedImage]:
    """Every sample of the shards, in order. Raises DataError for one without mask or annotation, or that is not square."""
    for sample in WebDataset(expand_shards(shards, allow_pipe=False), shardshuffle=False):
        yield _parse_sample(sample)


def patch_kinds(number_HW: Tensor, named: Sequence[int], *, grid: int) -> PatchKinds:
    """Which of the grid x grid patches (row by row) show named objects, others, nothing; `named` are objects from 0 on."""
    object_N = torch.arange(1, int(number_HW.max()) + 1)
    is_named_N = torch.isin(object_N, torch.tensor(list(named), dtype=torch.int64) + 1)
    is_object_NHW = number_HW == object_N[:, None, None]
    masks = (is_object_NHW[is_named_N].any(0), is_object_NHW[~is_named_N].any(0))
    named_P, unnamed_P = (F.adaptive_avg_pool2d(mask[None].double(), grid).flatten() for mask in masks)
    return PatchKinds(
        (named_P >= OBJECT_SHARE) & (unnamed_P < OBJECT_SHARE),
        (unnamed_P >= OBJECT_SHARE) & (named_P < OBJECT_SHARE),
        named_P + unnamed_P == 0,
    )


def area_under_curve(score_BP: Tensor, is_positive_BP: Tensor, is_negative_BP: Tensor) -> Tensor:
    """B: how often a positive patch scores above a negative one, a tie counting half (Mann-Whitney); NaN without pairs."""
    above_BPP = (score_BP[:, :, None] > score_BP[:, None, :]).double()
    above_BPP += 0.5 * (score_BP[:, :, None] == score_BP[:, None, :])
    is_pair_BPP = is_positive_BP[:, :, None] & is_negative_BP[:, None, :]
    return (above_BPP * is_pair_BPP).sum((1, 2)) / is_pair_BPP.sum((1, 2))


def shift_by_one(texts: list[str]) -> list[str]:
    """Each image gets the next one's caption, the last the first one's."""
    return texts[1:] + texts[:1]


def _parse_sample(sample: dict[str, Any]) -> AnnotatedImage:
    key = f"{sample.get('__url__')}:{sample['__key__']}"
    extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
    if extension is None or "mask.png" not in sample or "json" not in sample:
        found = ", ".join(name for name in sample if not name.startswith("__"))
        raise DataError(f"{key}: expected an image, mask.png and json, found {found}; use the scenes' val shards")
    meta = json.loads(sample["json"])
    if not {"captions", "caption_objects"} <= meta.keys():
        raise DataError(f"{key}: its json lacks `captions` or `caption_objects`; use the scenes' val shards")
    image = Image.open(BytesIO(sample[extension])).convert("RGB")
    mask = np.array(Image.open(BytesIO(sample["mask.png"])))
    if image.width != image.height or mask.shape != (image.height, image.width):
        raise DataError(
            f"{key}: expected a square image and a mask of its size (the transform may crop others), "
            f"found {image.width} x {image.height} and {mask.shape[::-1]}"
        )
    return AnnotatedImage(key, image, torch.from_numpy(mask), meta["captions"], meta["caption_objects"])
