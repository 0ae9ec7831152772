"""Captions without images, from shards and from text files."""

from pathlib import Path

import pytest

from sycoca.data.caption_texts import read_captions
from sycoca.data.decode import CaptionConfig
from sycoca.data.scenes import write_scenes
from sycoca.types import DataError


def test_a_text_file_has_a_caption_a_line_and_may_name_images(tmp_path: Path):
    path = tmp_path / "captions.txt"
    path.write_text("a dog\none.jpg\ta cat\n\none.jpg\t two cats \n", encoding="utf-8")
    expected = {"captions.txt:0": ["a dog"], "one.jpg": ["a cat", "two cats"]}
    assert read_captions([str(path)], CaptionConfig()) == expected


def test_shards_give_every_caption_by_image(tmp_path: Path):
    write_scenes(tmp_path, num_train=3, num_val=1, size=32, samples_per_shard=2)
    captions = read_captions([str(tmp_path / "train-*.tar")], CaptionConfig())
    assert list(captions) == [f"train{number:07d}" for number in range(3)]
    written = (tmp_path / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert [text for texts in captions.values() for text in texts] == written


def test_no_caption_at_all_is_an_error(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="found no caption"):
        read_captions([str(tmp_path / "empty.txt")], CaptionConfig())
    with pytest.raises(DataError, match="no such shard"):
        read_captions([str(tmp_path / "missing.txt")], CaptionConfig())
