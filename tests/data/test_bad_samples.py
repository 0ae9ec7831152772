"""A data set with one of everything that goes wrong: the run goes on, and each loss is counted by its reason."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shard_maker import encode_image, make_config, make_json, make_pair, save_image, write_shard, write_shards

from sycoca.data.pipeline import build_train_loader
from sycoca.data.position import DropCounter, DropLog
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.types import DataError


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


def _run(config: Any, clip: Tokenizer, num: int) -> tuple[list[dict[str, Any]], DropCounter]:
    batches = list(islice(build_train_loader(config, clip, seed=0, rank=0, world_size=1), num))
    drops = DropCounter()
    for batch in batches:
        drops.add(batch["position"])
    return batches, drops


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_counted_by_reason_in_the_training_process(tmp_path: Path, clip: Tokenizer, num_workers: int) -> None:
    good = encode_image(size=(60, 40))
    bad = {
        "empty_image": make_pair("b0", image=b""),
        "truncated_image": make_pair("b1", image=good[: len(good) // 2]),
        "unsupported_image": make_pair("b2", image=b"<html>"),
        "image_too_large": make_pair("b3", image=encode_image(size=(300, 200))),
        "image_too_many_bytes": make_pair("b4", image=bytes(70_000)),
        "empty_caption": [*make_pair("b5", caption=b" \n"), *make_pair("b6", caption=b"\x00\x01")],
        "bad_text": make_pair("b7", caption=b"\xff\xfe\xfa"),
        "bad_json": [("b8.jpg", good), ("b8.json", b"{")],
        "missing_caption": make_pair("b9")[:1],
        "missing_image": make_pair("c0")[1:],
        "truncated_caption": make_pair("c1", caption=b"word " * 9000),
    }
    rows = [make_pair(f"g{i}") for i in range(20)] + list(bad.values()) + [make_pair("g0")]
    write_shard(tmp_path / "a.tar", [member for row in rows for member in row])
    config = make_config(tmp_path, batch_size=1, num_workers=num_workers, max_pixels=50_000, max_bytes=60_000, max_tokens=9)
    batches, drops = _run(config, clip, 80)
    epoch = [batch for batch in batches if batch["position"]["epoch"] == 0]
    assert sorted(key for batch in epoch for key in batch["key"]) == sorted([f"g{i}" for i in range(20)] + ["c1"])
    assert set(drops.counts) == {*bad, "duplicate_key"}
    assert drops.counts["empty_caption"] >= 2 * drops.counts["bad_text"] - 2
    assert drops.total() == sum(drops.counts.values()) - drops.counts["truncated_caption"]
    assert str(tmp_path / "a.tar") in drops.line()


def test_unusual_images_are_trained_on(tmp_path: Path, clip: Tokenizer) -> None:
    images = {
        "cmyk.jpg": save_image(Image.new("CMYK", (9, 7)), "JPEG"),
        "deep.png": save_image(Image.new("I;16", (9, 7), 40_000), "PNG"),
        "palette.png": save_image(Image.new("P", (9, 7)), "PNG", transparency=0),
        "moving.webp": save_image(Image.new("RGB", (9, 7)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 7), 9)]),
        "tiny.png": save_image(Image.new("1", (1, 1)), "PNG"),
    }
    members = [row for name, data in images.items() for row in ((name, data), (f"{name.split('.')[0]}.txt", b"a"))]
    write_shard(tmp_path / "a.tar", members)
    (batch,), drops = _run(make_config(tmp_path, batch_size=5), clip, 1)
    assert sorted(batch["key"]) == ["cmyk", "deep", "moving", "palette", "tiny"]
    assert batch["image"].isfinite().all()
    assert drops.line() == "no samples dropped"


def test_a_very_long_caption_is_cut_and_kept(tmp_path: Path, clip: Tokenizer) -> None:
    write_shard(tmp_path / "a.tar", [*make_pair("a", caption=b"long " * 100_000), *make_pair("b", caption=b"x" * 900_000)])
    (batch,), drops = _run(make_config(tmp_path, batch_size=2, max_tokens=20), clip, 1)
    assert batch["length"].tolist() == [20, 20]
    assert batch["token"][:, -1].tolist() == [clip.eos] * 2
    assert drops.counts == {"truncated_caption": 2}
    assert drops.total() == 0


def test_damaged_shards_are_counted_and_the_others_go_on(tmp_path: Path, clip: Tokenizer) -> None:
    write_shards(tmp_path, [6, 6, 6])
    cut, spoilt = tmp_path / "00001.tar", tmp_path / "00002.tar"
    cut.write_bytes(cut.read_bytes()[: 512 * 20])
    spoilt.write_bytes(b"\x07" * 2048)
    batches, drops = _run(make_config(tmp_path, batch_size=1), clip, 30)
    keys = {key for batch in batches for key in batch["key"]}
    assert {f"0_{i}" for i in range(6)} < keys
    assert {"1_0", "1_1"} <= keys
    assert drops.counts["truncated_tar"] >= 2
    assert drops.counts["corrupt_tar"] >= 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_stop_the_run_with_the_worst_shard(tmp_path: Path, clip: Tokenizer, num_workers: int) -> None:
    write_shards(tmp_path, [60])
    rows = [row for i in range(60) for row in make_pair(f"bad{i}", image=b"")]
    write_shard(tmp_path / "00001.tar", rows)
    config = make_config(tmp_path, max_bad_share=0.3, num_workers=num_workers)
    with pytest.raises(DataError, match=r"worst file: .*00001\.tar \(\d+ empty_image\)"):
        _run(config, clip, 100)


def test_a_rate_within_the_limit_does_not_stop_the_run(tmp_path: Path, clip: Tokenizer) -> None:
    rows = [row for i in range(40) for row in make_pair(f"{i}", image=b"" if i % 4 == 0 else None)]
    write_shard(tmp_path / "a.tar", rows)
    _, drops = _run(make_config(tmp_path, max_bad_share=0.3), clip, 50)
    assert drops.counts["empty_image"] > 50


def test_few_samples_are_not_judged() -> None:
    log = DropLog(0.1)
    for _ in range(99):
        log.add("empty_image", "a.tar")
    with pytest.raises(DataError, match="100 of 100 samples"):
        log.add("empty_image", "a.tar")


def test_only_bad_samples_end_in_an_error_not_in_a_hang(tmp_path: Path, clip: Tokenizer) -> None:
    write_shard(tmp_path / "a.tar", make_pair("a", image=b""))
    with pytest.raises(DataError, match=r"no usable sample.*a\.tar \(3 empty_image\)"):
        _run(make_config(tmp_path), clip, 1)


def test_sources_and_json_captions_reach_the_batch(tmp_path: Path, clip: Tokenizer) -> None:
    write_shard(tmp_path / "a.tar", [*make_pair("a"), ("a.json", make_json(alt="other words"))])
    config = make_config(tmp_path, batch_size=1, captions={"sources": {"json.alt": 1.0}})
    (batch,), _ = _run(config, clip, 1)
    assert clip.decode(batch["token"][0].tolist()) == "other words"
