"""Images by name and row, from folders and tars, in any process."""

import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from shard_maker import encode_image, write_shard

from sycoca.data.image_store import ImageStore
from sycoca.types import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders of images; `same.jpg` is in both."""
    root = tmp_path / "images"
    for number, name in enumerate(["train/a.jpg", "train/same.jpg", "val/b.x.png", "val/same.jpg", "val/notes.txt"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_image(number))
    return root


def pack(folder: Path, path: Path) -> Path:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return write_shard(path, [(f"./{file.relative_to(folder)}", file.read_bytes()) for file in files])


def test_a_folder_and_a_tar_of_it_give_the_same_images(folder: Path, tmp_path: Path):
    tar = ImageStore([str(pack(folder, tmp_path / "images.tar"))])
    plain = ImageStore([str(folder)])
    assert len(tar) == len(plain) == 4
    for name in ("train/a.jpg", "train/same.jpg", "val/b.x.png", "val/same.jpg"):
        expected = (folder / name).read_bytes()
        assert tar.read(tar.require(name)) == plain.read(plain.require(name)) == expected
        assert tar.name(tar.require(name)) == name


def test_a_file_name_is_enough_where_only_one_image_has_it(folder: Path):
    store = ImageStore([str(folder)])
    assert store.find("b.x.png") == store.find("val/b.x.png") is not None
    assert store.find("same.jpg") is None
    assert store.find("notes.txt") is store.find("a") is store.find("") is store.find("zzz.jpg") is None


def test_the_first_of_several_sources_counts(folder: Path):
    store = ImageStore([str(folder / "val"), str(folder / "train")])
    assert store.read(store.require("same.jpg")) == (folder / "val" / "same.jpg").read_bytes()
    assert store.read(store.require("a.jpg")) == (folder / "train" / "a.jpg").read_bytes()
    assert [store.name(row) for row in store.rows_of(1)] == ["a.jpg", "same.jpg"]
    assert {store.source_of(row) for row in store.rows_of(0)} == {0}


def test_braces_and_folders_of_tars_are_expanded(folder: Path, tmp_path: Path):
    for name in ("train", "val"):
        (tmp_path / "tars").mkdir(exist_ok=True)
        pack(folder / name, tmp_path / "tars" / f"{name}.tar")
    for source in (str(tmp_path / "tars"), str(tmp_path / "tars" / "{train,val}.tar"), str(tmp_path / "tars" / "*.tar")):
        store = ImageStore([source])
        assert [path.name for path in store.sources()] == ["train.tar", "val.tar"]
        assert len(store) == 4


def test_a_missing_image_names_itself_and_the_store(folder: Path):
    with pytest.raises(DataError, match=r"gone\.jpg: no such image in .*images.*a\.jpg is there"):
        ImageStore([str(folder)]).require("gone.jpg")


def test_an_image_that_goes_away_is_explained(folder: Path):
    store = ImageStore([str(folder)])
    (folder / "train" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"train/a\.jpg: cannot be read from .*No such file"):
        store.read(store.require("a.jpg"))


def test_sources_without_images_are_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in it"):
        ImageStore([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="no folder and no tar"):
        ImageStore([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="at least one"):
        ImageStore([])


def test_another_process_reads_at_random(folder: Path, tmp_path: Path):
    tar = ImageStore([str(pack(folder, tmp_path / "images.tar"))])
    shutil.rmtree(folder)
    rows = [3, 0, 2, 1, 3]
    expected = [tar.read(row) for row in rows]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(tar.read, rows)) == expected


def test_memory_is_arrays_not_objects(folder: Path):
    store = ImageStore([str(folder)])
    per_image = len(pickle.dumps(store)) / len(store)
    assert all(not isinstance(value, dict) for value in vars(store).values())
    assert per_image < 1000
