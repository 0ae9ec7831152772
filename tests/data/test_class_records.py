"""Records of labelled images: folders, tars and shards give the same classes; what is wrong with them is said."""

import json
import os
from pathlib import Path
from random import Random

import pytest
from shard_maker import encode_image, write_shard

from sycoca.data.classes import load_class_records
from sycoca.data.indexed import IndexedConfig, build_indexed_eval_loader
from sycoca.data.scenes import write_scenes
from sycoca.data.tokenizer import build_tokenizer
from sycoca.types import DataError

DATA = Path(os.environ.get("SYCOCA_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = ["train/cat/1.jpg", "train/cat/2.x.jpg", "train/bee/1.jpg", "val/cat/1.jpg", "val/bee/7.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_image(number))
    return folder


def pack(root: Path, path: Path) -> str:
    return str(write_shard(path, [(name, (root / name).read_bytes()) for name in FILES]))


def shard(path: Path, *samples: tuple[str, dict[str, object]]) -> str:
    members = []
    for key, meta in samples:
        members += [(f"{key}.jpg", encode_image()), (f"{key}.mask.png", encode_image(1, form="PNG"))]
        members += [(f"{key}.json", json.dumps(meta).encode())]
    return str(write_shard(path, members))


def test_folders_and_tars_give_the_same_records(root: Path, tmp_path: Path):
    for source in (str(root), pack(root, tmp_path / "a.tar")):
        records = load_class_records([source], split="train")
        assert records.class_names == ("bee", "cat")
        found = {records.key(i): (records.target(i), records.image(i)) for i in range(len(records))}
        assert found == {name: (int("cat" in name), (root / name).read_bytes()) for name in FILES[:3]}
        assert records.num_by_class() == {"bee": 1, "cat": 2}


def test_a_folder_of_classes_needs_no_split(root: Path):
    records = load_class_records([str(root / "val")])
    assert [records.key(i) for i in range(len(records))] == ["bee/7.png", "cat/1.jpg"]


def test_the_text_never_tells_the_class(root: Path):
    records = load_class_records([str(root / "val")])
    assert {records.text(i, Random(0)) for i in range(len(records))} == {""}


def test_shards_tell_the_label_and_several_sources_keep_keys_apart(tmp_path: Path):
    sources = [
        shard(tmp_path / "a.tar", ("s1", {"class_name": "red star", "label": 5}), ("s2", {"class_name": "blue ring"})),
        shard(tmp_path / "b.tar", ("s1", {"class_name": "red star"})),
    ]
    records = load_class_records(sources)
    assert records.class_names == ("blue ring", "red star")
    assert [records.key(i) for i in range(len(records))] == ["0/s1.jpg", "0/s2.jpg", "1/s1.jpg"]
    assert [records.target(i) for i in range(len(records))] == [1, 0, 1]


def test_a_validation_set_takes_the_training_sets_places(root: Path, tmp_path: Path):
    (root / "val" / "bee" / "7.png").unlink()
    (root / "val" / "bee").rmdir()
    records = load_class_records([str(root / "val")], class_names=["bee", "cat"])
    assert [records.target(i) for i in range(len(records))] == [1]
    with pytest.raises(DataError, match=r"cat/1\.jpg: class 'cat' is none of the 1: dog"):
        load_class_records([str(root / "val")], class_names=["dog"])
    numbered = shard(tmp_path / "n.tar", ("a", {"label": 1}), ("b", {"label": 0}))
    by_place = load_class_records([numbered], class_names=["bee", "cat"])
    assert [by_place.target(i) for i in range(2)] == [1, 0]


def test_numbered_classes_keep_their_numbers_as_names(tmp_path: Path):
    train = load_class_records([shard(tmp_path / "t.tar", ("a", {"label": 3}), ("b", {"label": 10}))])
    assert train.class_names == ("3", "10")
    val = load_class_records([shard(tmp_path / "v.tar", ("a", {"label": 10}))], class_names=train.class_names)
    assert val.target(0) == 1
    with pytest.raises(DataError, match="class 1 is none"):
        load_class_records([shard(tmp_path / "w.tar", ("a", {"label": 1}))], class_names=train.class_names)


def test_splits_are_never_mixed_by_chance(root: Path, tmp_path: Path):
    for source in (str(root), pack(root, tmp_path / "a.tar")):
        with pytest.raises(DataError, match=r"class folders lie in 2 places \(train, val\); name the one to read as the split"):
            load_class_records([source])


def test_what_is_missing_is_named(root: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"no split 'test'; folders there: train, val"):
        load_class_records([str(root)], split="test")
    with pytest.raises(DataError, match=r"no labelled image found; expected <class>/<file> below 'test'"):
        load_class_records([pack(root, tmp_path / "a.tar")], split="test")
    (root / "val" / "ant").mkdir()
    with pytest.raises(DataError, match=r"val/ant: a class folder without images"):
        load_class_records([str(root)], split="val")
    (root / "val" / "ant").rmdir()
    (root / "val" / "stray.jpg").write_bytes(encode_image())
    with pytest.raises(DataError, match=r"stray\.jpg: an image outside any class folder"):
        load_class_records([str(root / "val")])


def test_scenes_have_classes(tmp_path: Path):
    write_scenes(tmp_path / "scenes", num_train=40, num_val=6, size=32, samples_per_shard=25)
    train = load_class_records([str(tmp_path / "scenes" / "train-*.tar")])
    assert len(train) == 40
    meta = json.loads((tmp_path / "scenes" / "classes.json").read_text())
    assert set(train.class_names) <= set(meta["class_names"])
    val = load_class_records([str(tmp_path / "scenes" / "val-*.tar")], class_names=meta["class_names"])
    assert len(val) == 6
    assert val.class_names == tuple(meta["class_names"])


@pytest.mark.skipif(not (DATA / "cifar10").exists(), reason="no real data at SYCOCA_DATA")
def test_cifar10_is_read_whole():
    train = load_class_records([str(DATA / "cifar10" / "train.tar")])
    val = load_class_records([str(DATA / "cifar10" / "val.tar")], class_names=train.class_names)
    assert (len(train), len(val), len(train.class_names)) == (10_000, 2_000, 10)
    config = IndexedConfig.model_validate({"batch_size": 8, "num_workers": 0, "transform": {"size": 32}})
    loader = build_indexed_eval_loader(
        val, config, tokenizer=build_tokenizer("clip"), rank=0, world_size=1, batch_size=500
    )
    labels = [label for batch in loader for label in batch["target"].tolist()]
    assert labels == [index for index in range(10) for _ in range(200)]
