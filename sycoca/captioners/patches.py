"""Patch states of an embedding store's images: kept on disk beside the embeddings, or encoded when they are asked for.

A part of the store (embeddings.py) then also holds patches.npy, float16, image by image in the order of its rows.json. It is
large (a ViT-B/32: 77 kB an image), and training reads it memory-mapped.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sycoca.captioners.embeddings import EmbeddingStore, Reading
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.config import parse_config
from sycoca.data.conversion import MAX_BYTES, MAX_PIXELS
from sycoca.data.decode import decode_image
from sycoca.data.image_store import ImageStore
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.shards import expand_shards
from sycoca.distributed import barrier, rank, world_size
from sycoca.types import DataError

_FILE = "patches.npy"
NUM_THREADS = 4
"""That decode images which are asked for by name."""


class PatchSource(Protocol):
    """Patch states of images by their keys."""

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """NMF float32."""
        ...


class StoredPatches:
    """Reads what `store_patches` wrote. Raises DataError where a part of the store has none."""

    def __init__(self, store: EmbeddingStore):
        self._place_of_key: dict[str, tuple[int, int]] = {}
        self._parts: list[NDArray[np.float16]] = []
        for number, (folder, keys) in enumerate(store.keys_by_part()):
            if not (folder / _FILE).is_file():
                raise DataError(f"{folder}: holds no patch states; name the shards of the split, so that they can be made")
            self._parts.append(np.load(folder / _FILE, mmap_mode="r"))
            self._place_of_key |= {key: (number, row) for row, key in enumerate(keys)}

    def __call__(self, keys: Sequence[str]) -> Tensor:
        places = [self._place_of_key[key] for key in keys]
        return torch.from_numpy(np.stack([self._parts[part][row] for part, row in places]).astype(np.float32))


class EncodedPatches:
    """Reads images by name from uncompressed shards, and encodes them each time. Raises DataError for a name that none has."""

    def __init__(self, encoder: FrozenEncoder, shards: Sequence[str]):
        self._encoder, self._images = encoder, ImageStore(shards)
        names = map(self._images.name, range(len(self._images)))
        self._row_of_key = {_key_of(name): row for row, name in enumerate(names)}

    def __call__(self, keys: Sequence[str]) -> Tensor:
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            pixel_BCHW = torch.stack(list(threads.map(self._read, keys)))
        return self._encoder.encode_patches(pixel_BCHW).cpu()

    def _read(self, key: str) -> Tensor:
        if key not in self._row_of_key:
            raise DataError(f"{key}: no image of this name in {self._images.describe()}; name the shards that were embedded")
        content = self._images.read(self._row_of_key[key])
        return self._encoder.transform(decode_image(content, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES, draft_size=0))


def _key_of(name: str) -> str:
    """A sample's key: its member's name up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def store_patches(encoder: FrozenEncoder, store: EmbeddingStore, reading: Reading) -> int:
    """Encode the patches of every part that has none yet; gives the number of parts made. All ranks share the shards.

    Raises DataError where the shards do not hold the store's images, or the store is another encoder's.
    """
    store.check_encoder(encoder.fingerprint)
    pending = {folder: keys for folder, keys in store.keys_by_part() if not (folder / _FILE).is_file()}
    barrier()  # before any rank finishes a part that another has not looked for yet
    part_of_key = {key: folder for folder, keys in pending.items() for key in keys}
    for shard in expand_shards(list(reading.shards), allow_pipe=False)[rank() :: world_size()] if pending else []:
        _store_shard(encoder, shard, reading, pending=pending, part_of_key=part_of_key)
    barrier()
    left = [folder for folder in pending if not (folder / _FILE).is_file()]
    if left:
        raise DataError(f"{left[0]}: its images are not in the shards that were named; name those that were embedded")
    return len(pending)


def _store_shard(
    encoder: FrozenEncoder, shard: str, reading: Reading, *, pending: dict[Path, list[str]], part_of_key: dict[str, Path]
) -> None:
    """One shard is one part: the first image says which."""
    patch_of_key: dict[str, NDArray[np.float16]] = {}
    for keys, patch_BPD in _encode_shard(encoder, shard, reading):
        patch_of_key |= zip(keys, patch_BPD.to(torch.float16).cpu().numpy(), strict=True)
    folder = part_of_key.get(next(iter(patch_of_key), ""))
    if folder is None:
        return
    if patch_of_key.keys() != set(pending[folder]):
        raise DataError(f"{shard}: holds other images than {folder}; embed it again, or name the shards that were embedded")
    draft = folder / f".{_FILE}.partial"
    with draft.open("wb") as file:
        np.save(file, np.stack([patch_of_key[key] for key in pending[folder]]))
    os.replace(draft, folder / _FILE)


def _encode_shard(encoder: FrozenEncoder, shard: str, reading: Reading) -> Iterator[tuple[list[str], Tensor]]:
    settings = {"shards": [shard], "batch_size": reading.batch_size, "num_workers": reading.num_workers}
    config = parse_config(DataConfig, {**settings, "transform": encoder.transform_config}, source="options")
    for batch in build_eval_loader(config, rank=0, world_size=1, batch_size=reading.batch_size):
        yield batch["key"], encoder.encode_patches(batch["image"])
