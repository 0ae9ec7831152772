"""Small shards and images for the tests of the data path."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sycoca.data.pipeline import DataConfig

Members = list[tuple[str, bytes]]


def encode_image(seed: int = 0, *, size: tuple[int, int] = (30, 20), form: str = "JPEG") -> bytes:
    """A noise image, width x height."""
    pixel_HWC = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return save_image(Image.fromarray(pixel_HWC), form)


def save_image(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def make_pair(key: str, *, image: bytes | None = None, caption: bytes | None = None) -> Members:
    """A JPEG and its text file."""
    image = encode_image(int.from_bytes(key.encode(), "big") % 1000) if image is None else image
    return [(f"{key}.jpg", image), (f"{key}.txt", f"photo {key}".encode() if caption is None else caption)]


def write_shard(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int]) -> Path:
    """One shard for each number of pairs; keys are `<shard>_<sample>`."""
    folder.mkdir(exist_ok=True)
    for shard, num in enumerate(sizes):
        members = [member for i in range(num) for member in make_pair(f"{shard}_{i}")]
        write_shard(folder / f"{shard:05d}.tar", members)
    return folder


def make_config(folder: Path, **changes: Any) -> DataConfig:
    """Tiny images, one loading process: the training process itself."""
    tree = {"shards": [str(folder)], "batch_size": 4, "num_workers": 0, "shuffle_buffer": 5, "transform": {"size": 8}}
    return DataConfig.model_validate({**tree, **changes})


def make_json(**entries: Any) -> bytes:
    return json.dumps(entries).encode()
