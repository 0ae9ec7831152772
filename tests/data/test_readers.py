"""Readers of Karpathy splits, COCO captions and tables."""

import json
import os
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from sycoca.data.readers import build_key, open_images, read_bytes, read_coco, read_karpathy, read_table
from sycoca.types import DataError

DATA = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.jpg", "b.x.jpg", "sub/c.jpg"]):
        Image.new("RGB", (8 + number, 6), (40 * number, 90, 10)).save(folder / name)
    return folder


def pack(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname=".")
    return path


def write_karpathy(path: Path) -> Path:
    rows = [("a.jpg", "train"), ("b.x.jpg", "restval"), ("sub/c.jpg", "val"), ("gone.jpg", "train")]
    sentences = [{"raw": " A dog\n runs . "}, {"raw": "it sits"}]
    path.write_text(json.dumps({"images": [{"filename": n, "split": s, "sentences": sentences} for n, s in rows]}))
    return path


def test_a_tar_gives_the_same_bytes_as_the_folder(images: Path, tmp_path: Path):
    folder, tar = open_images(images), open_images(pack(images, tmp_path / "images.tar"))
    for name in ("a.jpg", "b.x.jpg", "sub/c.jpg"):
        assert read_bytes(tar.find(name)) == read_bytes(folder.find(name)) == (images / name).read_bytes()
    assert tar.find("gone.jpg") is folder.find("gone.jpg") is None


def test_a_tar_finds_a_file_name_unless_two_members_have_it(images: Path, tmp_path: Path):
    (images / "sub" / "a.jpg").write_bytes(b"another")
    tar = open_images(pack(images, tmp_path / "images.tar"))
    assert read_bytes(tar.find("c.jpg")) == (images / "sub" / "c.jpg").read_bytes()
    assert tar.find("elsewhere/a.jpg") is None
    assert read_bytes(tar.find("a.jpg")) == (images / "a.jpg").read_bytes()


def test_a_compressed_tar_is_refused(images: Path, tmp_path: Path):
    with pytest.raises(DataError, match="uncompressed"):
        open_images(pack(images, tmp_path / "images.tar.gz", "w:gz"))


def test_no_images_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        open_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "key"), [("a.jpg", "a"), ("b.x.jpg", "b_x"), ("/sub/c.jpg", "sub_c"), ("../d e.jpg", "d_e"), ("f", "f")]
)
def test_keys_are_safe_in_a_shard(name: str, key: str):
    assert build_key(name) == key


def test_karpathy_train_takes_restval(images: Path, tmp_path: Path):
    records = list(read_karpathy(write_karpathy(tmp_path / "k.json"), open_images(images), split="train"))
    assert [record.key for record in records] == ["a", "b_x", "gone"]
    assert records[0].captions == ("A dog runs .", "it sits")
    assert [record.image is None for record in records] == [False, False, True]


def test_karpathy_filepath_names_the_folder(images: Path, tmp_path: Path):
    row = {"filename": "c.jpg", "filepath": "sub", "split": "val", "sentences": [{"raw": "x"}]}
    (tmp_path / "k.json").write_text(json.dumps({"images": [row]}))
    (record,) = read_karpathy(tmp_path / "k.json", open_images(images), split="val")
    assert record.image == open_images(images).find("sub/c.jpg")


def test_an_unknown_split_names_those_there(images: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"'test'.*'train': 3, 'val': 1"):
        list(read_karpathy(write_karpathy(tmp_path / "k.json"), open_images(images), split="test"))


def test_coco_gathers_captions_by_image(images: Path, tmp_path: Path):
    rows = [{"id": 7, "file_name": "a.jpg"}, {"id": 4, "file_name": "sub/c.jpg"}, {"id": 5, "file_name": "b.x.jpg"}]
    captions = [(4, "first"), (7, "other"), (4, "second")]
    tree = {"images": rows, "annotations": [{"image_id": i, "caption": c} for i, c in captions]}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    records = list(read_coco(tmp_path / "c.json", open_images(images)))
    assert [(record.key, record.captions) for record in records] == [
        ("a", ("other",)),
        ("sub_c", ("first", "second")),
        ("b_x", ()),
    ]
    assert records[0].meta["image_id"] == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object with a list 'images', found list"),
        ('{"images": [{"id": 1}]}', r"images\[0\].*file_name"),
        ('{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "image_id 3"),
    ],
)
def test_a_broken_json_is_explained(images: Path, tmp_path: Path, text: str, message: str):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(read_coco(tmp_path / "c.json", open_images(images)))
    assert "c.json" in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_of_every_kind_read_alike(images: Path, tmp_path: Path, suffix: str):
    table = pd.DataFrame({"path": ["a.jpg", "sub/c.jpg", "a.jpg", None], "text": ["NA", "two, or 3", None, "x"]})
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(file)
    else:
        table.to_csv(file, sep="," if suffix == ".csv" else "\t", index=False)
    columns = {"image_column": "path", "caption_column": "text"}
    apart = list(read_table(file, open_images(images), **columns, is_joining_rows=False))
    assert [(r.key, r.captions) for r in apart] == [("a", ("NA",)), ("sub_c", ("two, or 3",)), ("a", ("",)), ("row_4", ("x",))]
    joined = list(read_table(file, open_images(images), **columns, is_joining_rows=True))
    assert [(r.key, r.captions) for r in joined] == [("a", ("NA", "")), ("sub_c", ("two, or 3",)), ("row_4", ("x",))]
    assert joined[2].image is None


def test_an_unknown_column_names_those_there(images: Path, tmp_path: Path):
    (tmp_path / "t.csv").write_text("path,text\na.jpg,x\n")
    with pytest.raises(DataError, match=r"t.csv: no column 'caption'; columns there: path, text"):
        list(
            read_table(
                tmp_path / "t.csv",
                open_images(images),
                image_column="path",
                caption_column="caption",
                is_joining_rows=False,
            )
        )


@pytest.mark.skipif(not (DATA / "flickr8k").exists(), reason="no real data at SYCOCA_DATA")
def test_flickr8k_is_read_whole():
    images = open_images(DATA / "flickr8k" / "images.tar")
    records = list(read_karpathy(DATA / "flickr8k" / "dataset_flickr8k.json", images, split="val"))
    assert len(records) == 1000
    assert all(record.image is not None and len(record.captions) == 5 for record in records)


@pytest.mark.skipif(not (DATA / "coco_mini").exists(), reason="no real data at SYCOCA_DATA")
def test_coco_finds_images_below_a_folder_of_the_tar():
    images = open_images(DATA / "coco_mini" / "train2017.tar")
    records = list(read_coco(DATA / "coco_mini" / "captions_train2017.json", images))
    assert len(records) == 80
    assert all(record.image is not None and len(record.captions) >= 5 for record in records)
