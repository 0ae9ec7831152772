"""The embedded default data set: rendered scenes with captions, questions, class labels and object masks; nothing to download.

A scene is a function of (seed, index). Its class is the colour and shape of its one large object.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sycoca.data.scene_drawing import draw_background, draw_object, encode_image
from sycoca.data.scene_layout import TEXTURES, SceneObject, sample_objects
from sycoca.data.scene_text import CLASS_NAMES, CLASS_TEMPLATES, Caption, Question, ask, describe
from sycoca.data.shard_writer import Sample, save_text, write_shards
from sycoca.types import DataError

VERSION = 3
"""Raised when the same (seed, index) begins to give another scene, so that old folders are not taken for new ones."""
VAL_START = 1_000_000_000
"""Validation scenes have indices from here on; training scenes have those below."""
MIN_SIZE = 32
"""Pixels; in a smaller image the small objects cannot be told apart."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of a scene. `objects[0]` is the large one; `label` is its place in CLASS_NAMES."""

    objects: list[SceneObject]
    texture: str
    captions: list[Caption]
    questions: list[Question]
    label: int


@dataclass(frozen=True, slots=True)
class Scene:
    """An RGB image and what is true of it; `mask_NHW` holds one bool mask an object."""

    image: Image.Image
    mask_NHW: NDArray[np.bool_]
    facts: Facts


def invent_scene(seed: int, index: int, *, size: int = 64) -> Facts:
    """What the scene of that number shows, without drawing it; `size` is the image's side in pixels."""
    assert size >= MIN_SIZE, f"{size} pixels are too few for objects that can be told apart"
    generator = np.random.default_rng((seed, index, 0))
    objects = sample_objects(generator, size=size)
    texture = TEXTURES[int(generator.integers(len(TEXTURES)))]
    return Facts(
        objects=objects,
        texture=texture,
        captions=describe(generator, objects, texture=texture),
        questions=ask(generator, objects, texture=texture),
        label=CLASS_NAMES.index(objects[0].name),
    )


def render_scene(seed: int, index: int, *, size: int = 64) -> Scene:
    """The scene of that number, drawn in `size` x `size` pixels."""
    facts = invent_scene(seed, index, size=size)
    generator = np.random.default_rng((seed, index, 1))
    pixel_HWC = draw_background(generator, texture=facts.texture, size=size)
    mask_NHW = np.stack([draw_object(generator, pixel_HWC, item=item) for item in facts.objects])
    return Scene(Image.fromarray(np.clip(pixel_HWC, 0, 255).astype(np.uint8)), mask_NHW, facts)


def write_scenes(
    folder: Path,
    *,
    num_train: int = 20_000,
    num_val: int = 1_000,
    size: int = 64,
    seed: int = 0,
    samples_per_shard: int = 1_000,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Write `train-*.tar`, `val-*.tar`, `classes.json`, `captions.txt` (training captions) and `tokenizer/`.

    What is there already is kept, so a complete folder costs nothing. Raises DataError for numbers that cannot be used, and
    where the folder was begun with other ones.
    """
    _check_numbers(num_train=num_train, num_val=num_val, size=size, samples_per_shard=samples_per_shard)
    plan = {
        "made": "scenes",
        "version": VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "size": size,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    jobs = {
        **_split_jobs("train", range(num_train), samples_per_shard),
        **_split_jobs("val", range(VAL_START, VAL_START + num_val), samples_per_shard),
    }
    index = write_shards(folder, partial(_render_samples, seed, size), jobs=jobs, plan=plan, num_processes=num_processes)
    if not (folder / "tokenizer").exists():
        _save_texts(folder, seed=seed, size=size, num_train=num_train)
    return {"folder": str(folder), "num_train": num_train, "num_val": num_val, "num_bytes": index["num_bytes"]}


def _check_numbers(*, num_train: int, num_val: int, size: int, samples_per_shard: int) -> None:
    if num_train < 1 or num_val < 1 or samples_per_shard < 1:
        raise DataError(
            f"scenes: expected at least one scene in each split and shard, "
            f"found {num_train} train, {num_val} val, {samples_per_shard} a shard"
        )
    if size < MIN_SIZE:
        raise DataError(f"scenes: expected images of {MIN_SIZE} pixels or more, found {size}")


def _split_jobs(split: str, indices: range, samples_per_shard: int) -> dict[str, range]:
    starts = range(0, len(indices), samples_per_shard)
    return {f"{split}-{number:05d}": indices[start : start + samples_per_shard] for number, start in enumerate(starts)}


def _render_samples(seed: int, size: int, indices: range) -> Iterator[Sample]:
    for index in indices:
        scene = render_scene(seed, index, size=size)
        members = {"jpg": encode_image(scene.image, "JPEG"), "json": json.dumps(_as_json(scene.facts)).encode()}
        if index >= VAL_START:
            members["mask.png"] = encode_image(_number_pixels(scene.mask_NHW), "PNG")
            yield Sample(f"val{index - VAL_START:07d}", members)
        else:
            yield Sample(f"train{index:07d}", members)


def _number_pixels(mask_NHW: NDArray[np.bool_]) -> Image.Image:
    """Greyscale: 0 is background, n + 1 is `objects[n]`."""
    number_N = np.arange(1, len(mask_NHW) + 1, dtype=np.uint8)
    return Image.fromarray((mask_NHW * number_N[:, None, None]).sum(axis=0, dtype=np.uint8))


def _as_json(facts: Facts) -> dict[str, Any]:
    return {
        "captions": [caption.text for caption in facts.captions],
        "caption_objects": [caption.named for caption in facts.captions],
        "class_name": CLASS_NAMES[facts.label],
        "label": facts.label,
        "questions": [question._asdict() for question in facts.questions],
        "objects": [asdict(item) for item in facts.objects],
        "background": facts.texture,
    }


def _save_texts(folder: Path, *, seed: int, size: int, num_train: int) -> None:
    from sycoca.data.tokenizer import train_word_tokenizer  # slow to import, and every drawing process imports this file

    facts = [invent_scene(seed, index, size=size) for index in range(num_train)]
    captions = [caption.text for scene in facts for caption in scene.captions]
    answered = [f"{question.question} {question.answer}" for scene in facts for question in scene.questions]
    save_text(folder / "classes.json", json.dumps({"class_names": CLASS_NAMES, "templates": CLASS_TEMPLATES}, indent=1))
    save_text(folder / "captions.txt", "\n".join(captions) + "\n")
    train_word_tokenizer([*captions, *answered], folder / "tokenizer.tmp")
    os.replace(folder / "tokenizer.tmp", folder / "tokenizer")  # last: what is asked for to know that all is there
