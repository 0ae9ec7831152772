"""Relevance and reconstruction measured on subjects whose answers are known."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sycoca.evaluation.relevance import (
    OBJECT_SHARE,
    AnnotatedImage,
    ReconstructionEvaluator,
    RelevanceEvaluator,
    area_under_curve,
    patch_kinds,
    read_annotated,
    shift_by_one,
)
from sycoca.types import DataError

SIZE, GRID = 12, 3


def make_scene(number: int) -> AnnotatedImage:
    """Object 0 fills the top left patch, object 1 the bottom right one; each caption names what its list says."""
    number_HW = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    number_HW[:4, :4], number_HW[8:, 8:] = 1, 2
    image = Image.new("RGB", (SIZE, SIZE), (number, 0, 0))
    return AnnotatedImage(f"scene {number}", image, number_HW, [f"first of {number}", "both", "neither"], [[0], [0, 1], []])


class Knowing:
    """Scores a patch by what its caption says of the object there."""

    def __init__(self, named: float, unnamed: float, background: float):
        self.scores = named, unnamed, background

    def relevance(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        named, unnamed, background = self.scores
        score_BP = torch.full((len(images), GRID**2), background)
        score_BP[:, [0, -1]] = unnamed
        for row, text in enumerate(texts):
            if "neither" not in text:
                score_BP[row, 0] = named
            if "both" in text:
                score_BP[row, -1] = named
        return score_BP


def test_auc_equals_counting_pairs_ties_as_half() -> None:
    generator = torch.Generator().manual_seed(0)
    score_BP = torch.randint(4, (5, 11), generator=generator).double()
    kind_BP = torch.stack([torch.randperm(11, generator=generator) % 3 for _ in range(5)])
    found_B = area_under_curve(score_BP, kind_BP == 0, kind_BP == 1)
    for row in range(5):
        pairs = [
            (score_BP[row, i].item(), score_BP[row, j].item())
            for i in range(11)
            for j in range(11)
            if kind_BP[row, i] == 0 and kind_BP[row, j] == 1
        ]
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
        assert found_B[row].item() == pytest.approx(wins / len(pairs))


def test_auc_without_a_pair_is_nan() -> None:
    none_BP = torch.zeros(1, 4, dtype=torch.bool)
    assert area_under_curve(torch.rand(1, 4), none_BP, ~none_BP).isnan().all()


def test_patch_kinds_equal_counting_pixels() -> None:
    generator = np.random.default_rng(0)
    number_HW = torch.from_numpy(generator.integers(0, 4, (15, 15)) * generator.integers(0, 2, (15, 15)))
    number_HW[:5, :10], number_HW[5:10, :5] = 0, 3
    kinds = patch_kinds(number_HW, [0, 2], grid=3)
    for place in range(9):
        top, left = 5 * (place // 3), 5 * (place % 3)
        pixels = [int(number_HW[y, x]) for y in range(top, top + 5) for x in range(left, left + 5)]
        named = sum(pixel in (1, 3) for pixel in pixels) / 25
        unnamed = sum(pixel == 2 for pixel in pixels) / 25
        assert bool(kinds.is_named_BP[place]) == (named >= OBJECT_SHARE and unnamed < OBJECT_SHARE)
        assert bool(kinds.is_unnamed_BP[place]) == (unnamed >= OBJECT_SHARE and named < OBJECT_SHARE)
        assert bool(kinds.is_background_BP[place]) == all(pixel == 0 for pixel in pixels)


def test_a_patch_that_is_barely_touched_counts_for_nothing() -> None:
    number_HW = torch.zeros(8, 8, dtype=torch.uint8)
    number_HW[0, :3] = 1  # 3 of the 16 pixels of the first of four patches
    kinds = patch_kinds(number_HW, [0], grid=2)
    assert not (kinds.is_named_BP | kinds.is_unnamed_BP | kinds.is_background_BP)[0]
    assert kinds.is_background_BP[1:].all()


def test_relevance_that_is_the_true_mask_has_every_auc_1() -> None:
    metrics = RelevanceEvaluator([make_scene(n) for n in range(5)], batch_size=4)(Knowing(0.9, 0.5, 0.1))
    assert metrics["named_vs_background"] == metrics["unnamed_vs_background"] == metrics["named_vs_unnamed"] == 1.0
    # of a scene's three captions two name something, two leave something unnamed, one does both
    assert metrics["named_vs_background/num_pairs"] == metrics["unnamed_vs_background/num_pairs"] == 10
    assert metrics["named_vs_unnamed/num_pairs"] == 5


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.1, 0.5, 0.9), (0.0, 0.0, 0.0)),  # inverted
        ((0.7, 0.7, 0.1), (1.0, 1.0, 0.5)),  # finds objects, does not read
        ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5)),  # constant
        ((0.7, 0.1, 0.1), (1.0, 0.5, 1.0)),  # reads, and sees no other object
    ],
)
def test_the_three_aucs_tell_ways_to_fail_apart(scores: tuple, expected: tuple) -> None:
    metrics = RelevanceEvaluator([make_scene(0)])(Knowing(*scores))
    assert tuple(metrics[name] for name in ("named_vs_background", "unnamed_vs_background", "named_vs_unnamed")) == expected


def test_relevance_without_data_is_an_error() -> None:
    with pytest.raises(DataError, match="found none"):
        RelevanceEvaluator([])(Knowing(1, 0, 0))


class Recording:
    """Error 1 with the own caption, 3 with another's, 6 with none, plus the image's number; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], list[str], list[str]]] = []

    def reconstruction_error(self, images: list[Image.Image], mask_texts: list[str], guide_texts: list[str]) -> Tensor:
        numbers = [image.getpixel((0, 0))[0] for image in images]
        self.calls.append((numbers, mask_texts, guide_texts))
        own = [f"first of {n}" for n in numbers]
        return torch.tensor(
            [n + (1.0 if guide == mine else 3.0 if guide else 6.0) for n, mine, guide in zip(numbers, own, guide_texts)]
        )


def test_only_the_guidance_differs_and_other_captions_come_from_the_next_image() -> None:
    subject = Recording()
    metrics = ReconstructionEvaluator([make_scene(n) for n in range(5)], batch_size=2)(subject)
    assert all(masks == [f"first of {n}" for n in numbers] for numbers, masks, _ in subject.calls)
    others = [guides for _, _, guides in subject.calls[1::3]]
    assert others == [["first of 1", "first of 2"], ["first of 3", "first of 4"], ["first of 0"]]
    assert metrics["error/own"] == pytest.approx(3.0)
    assert metrics["gain/over_other"] == pytest.approx(2.0)
    assert metrics["gain/over_none"] == pytest.approx(5.0)
    assert metrics["gain/over_none_standard_error"] == pytest.approx(0.0)  # paired: the images' own numbers cancel
    assert metrics["num_images"] == 5


def test_shift_by_one_is_a_cycle_without_fixed_points() -> None:
    assert shift_by_one(["a", "b", "c"]) == ["b", "c", "a"]


def write_shard(path: Path, *, has_mask: bool = True, width: int = SIZE) -> None:
    scene = make_scene(7)
    buffers = {"jpg": io.BytesIO(), "mask.png": io.BytesIO()}
    Image.new("RGB", (width, SIZE)).save(buffers["jpg"], "JPEG")
    Image.fromarray(scene.number_HW.numpy()).save(buffers["mask.png"], "PNG")
    meta = {"captions": scene.captions, "caption_objects": scene.caption_objects}
    members = {"jpg": buffers["jpg"].getvalue(), "json": json.dumps(meta).encode()}
    if has_mask:
        members["mask.png"] = buffers["mask.png"].getvalue()
    with tarfile.open(path, "w") as tar:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"val7.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_shards_are_read_with_masks_and_what_captions_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "val-0.tar")
    [scene] = read_annotated([str(tmp_path)])
    assert torch.equal(scene.number_HW, make_scene(7).number_HW)
    assert scene.caption_objects == [[0], [0, 1], []]
    assert scene.image.size == (SIZE, SIZE)


@pytest.mark.parametrize(("options", "message"), [({"has_mask": False}, "mask.png"), ({"width": 20}, "square")])
def test_samples_that_cannot_be_scored_are_errors(tmp_path: Path, options: dict, message: str) -> None:
    write_shard(tmp_path / "val-0.tar", **options)
    with pytest.raises(DataError, match=message):
        list(read_annotated([str(tmp_path)]))
