"""Embedding stores of real shards: what is kept, what is gone on with, what is refused; and aligners fitted on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compass import build_compass
from PIL import Image

from sycoca.captioners import embeddings
from sycoca.captioners.datastore_files import rows_of_store
from sycoca.captioners.embeddings import EmbeddingStore, Reading, embed_shards
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.types import DataError
from tests.data.shard_maker import Members, save_image, write_shard

SIZES = (3, 1, 4)


def image_number(shard: int, number: int) -> int:
    return 10 * shard + number


def make_sample(shard: int, number: int) -> Members:
    """A grey image that says its number; image n of a shard has n + 1 captions."""
    name = image_number(shard, number)
    captions = [f"caption {name} {turn} 0" for turn in range(number + 1)]
    image = save_image(Image.new("RGB", (9, 9), (name, name, name)), "PNG")
    return [(f"k{name}.png", image), (f"k{name}.json", json.dumps({"captions": captions}).encode())]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        write_shard(folder / f"{shard}.tar", [member for number in range(size) for member in make_sample(shard, number)])
    return folder


def embed(folder: Path, shards: Path, *, split: str = "train", encoder: FrozenEncoder | None = None) -> dict:
    reading = Reading([str(shards)], split, batch_size=2, num_workers=0)
    return embed_shards(encoder or build_compass(), folder, reading)


def test_a_store_holds_every_image_and_caption_of_the_shards(tmp_path: Path, shards: Path):
    said = embed(tmp_path / "store", shards)
    store, encoder = EmbeddingStore(tmp_path / "store", "train"), build_compass()
    assert (said["num_images"], said["num_captions"], said["num_embedded"], said["num_kept"]) == (8, 6 + 1 + 10, 3, 0)
    assert said["fingerprint"] == store.fingerprint == encoder.fingerprint
    names = [image_number(shard, number) for shard, size in enumerate(SIZES) for number in range(size)]
    assert store.keys == [f"k{name}" for name in names]
    first = torch.stack([encoder.transform(Image.new("RGB", (9, 9), (name, name, name)))[:, 0, 0] for name in names])
    torch.testing.assert_close(store.image_rows(range(8)), first)
    torch.testing.assert_close(store.image_rows([7, 0, 3, 3]), first[[7, 0, 3, 3]])
    torch.testing.assert_close(torch.cat([block.image_NE for block in store.blocks()]), first)
    for block in store.blocks():
        for text, row, image in zip(block.texts, block.text_NE, block.image_of_text_N, strict=True):
            assert row.tolist() == [float(word) for word in text.split()[1:]]
            assert f"k{text.split()[1]}" == block.keys[image]
    assert store.row_of_key["k20"] == 4


def test_a_store_s_captions_become_rows_with_their_image_as_source(tmp_path: Path, shards: Path):
    embed(tmp_path / "store", shards)
    contents = rows_of_store(EmbeddingStore(tmp_path / "store", "train"))
    assert len(contents.rows) == 17
    for row, embedding in zip(contents.rows, contents.embedding_SE, strict=True):
        assert row.source == f"k{row.text.split()[1]}" and row.split == "train"
        np.testing.assert_array_equal(embedding, [float(word) for word in row.text.split()[1:]])


def test_finished_parts_are_kept_and_an_interrupted_one_is_made_again(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, seen = build_compass(), []
    encode = encoder.encode_image
    monkeypatch.setattr(encoder, "encode_image", lambda image: (seen.append(len(image)), encode(image))[1])
    real = np.save

    def stop_at_the_third_part(path: Path, rows: np.ndarray) -> None:
        if "train-2-" in str(path) and path.name == "texts.npy":
            raise KeyboardInterrupt
        real(path, rows)

    monkeypatch.setattr(embeddings.np, "save", stop_at_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "store", shards, encoder=encoder)
    assert len(EmbeddingStore(tmp_path / "store", "train")) == 4
    monkeypatch.setattr(embeddings.np, "save", real)
    seen.clear()
    said = embed(tmp_path / "store", shards, encoder=encoder)
    assert (said["num_embedded"], said["num_kept"], sum(seen)) == (1, 2, SIZES[2])
    assert len(EmbeddingStore(tmp_path / "store", "train")) == 8
    shutil.move(shards, tmp_path / "moved")
    assert embed(tmp_path / "store", tmp_path / "moved", encoder=encoder)["num_embedded"] == 0
    assert not [path for path in (tmp_path / "store" / "parts").iterdir() if path.name.startswith(".")]


def test_shards_of_one_name_and_size_are_told_apart_by_what_is_in_them(tmp_path: Path, shards: Path):
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "1.tar", make_sample(5, 0))
    assert (other / "1.tar").stat().st_size == (shards / "1.tar").stat().st_size
    embed(tmp_path / "store", shards)
    assert embed(tmp_path / "store", other)["num_embedded"] == 1
    assert len(EmbeddingStore(tmp_path / "store", "train")) == 9


def test_splits_lie_side_by_side(tmp_path: Path, shards: Path):
    embed(tmp_path / "store", shards / "0.tar")
    embed(tmp_path / "store", shards / "2.tar", split="val")
    assert EmbeddingStore(tmp_path / "store", "train").keys == ["k0", "k1", "k2"]
    assert EmbeddingStore(tmp_path / "store", "val").keys == ["k20", "k21", "k22", "k23"]
    with pytest.raises(DataError, match="split 'test'; there is train, val"):
        EmbeddingStore(tmp_path / "store", "test")


def test_a_store_is_of_one_encoder_and_a_key_of_one_image(tmp_path: Path, shards: Path):
    embed(tmp_path / "store", shards / "0.tar")
    with pytest.raises(DataError, match="do not belong together"):
        embed(tmp_path / "store", shards / "1.tar", encoder=build_compass(size=5))
    write_shard(shards / "again.tar", make_sample(0, 1))
    embed(tmp_path / "store", shards / "again.tar")
    with pytest.raises(DataError, match="k1: two images"):
        _ = EmbeddingStore(tmp_path / "store", "train").row_of_key
    with pytest.raises(DataError, match="no embedding store there"):
        EmbeddingStore(tmp_path, "train")
