"""Shards to raw samples: what is named is found, what is read is complete, what is damaged is counted."""

import gzip
from pathlib import Path

import pytest
from shard_maker import encode_image, make_pair, write_shard, write_shards

from sycoca.data.order import every_nth
from sycoca.data.position import DropLog
from sycoca.data.shards import RawSample, expand_shards, read_samples
from sycoca.types import DataError


def _read(shard: Path, *, max_bytes: int = 10**6, start: int = 0, step: int = 1) -> tuple[list[RawSample], dict[str, int]]:
    drops = DropLog(1.0)
    samples = list(read_samples(str(shard), drops, max_bytes=max_bytes, is_mine=every_nth(start, step)))
    return samples, drops.take()


def _keys(samples: list[RawSample]) -> list[str]:
    return [sample.key for sample in samples]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a.tar", [member for key in "vwxyz" for member in make_pair(key)])


def test_braces_folders_and_wildcards_name_shards_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [1, 1, 1])
    every = [str(tmp_path / "s" / f"{i:05d}.tar") for i in range(3)]
    assert expand_shards([str(tmp_path / "s")], allow_pipe=False) == every
    assert expand_shards([f"{tmp_path}/s/{{00000..00002}}.tar"], allow_pipe=False) == every
    assert expand_shards([f"{tmp_path}/s/*2.tar", every[0]], allow_pipe=False) == [every[2], every[0]]
    assert expand_shards(["https://host/{0..1}.tar"], allow_pipe=False) == ["https://host/0.tar", "https://host/1.tar"]


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"1\.tar: no such shard"):
        expand_shards([f"{tmp_path}/{{0..2}}.tar"], allow_pipe=False)
    with pytest.raises(DataError, match=r"x\*: no file matches"):
        expand_shards([f"{tmp_path}/x*"], allow_pipe=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: a folder without"):
        expand_shards([f"{tmp_path}/empty"], allow_pipe=False)
    with pytest.raises(DataError, match="at least one shard"):
        expand_shards([], allow_pipe=False)


def test_pipes_run_only_where_they_are_allowed(shard: Path) -> None:
    with pytest.raises(DataError, match="allow_pipe"):
        expand_shards([f"pipe:cat {shard}"], allow_pipe=False)
    (name,) = expand_shards([f"pipe:cat {shard}"], allow_pipe=True)
    assert _keys(_read(Path(name))[0]) == list("vwxyz")


def test_members_with_one_key_are_one_sample(tmp_path: Path) -> None:
    members = [("d.1/a.b.cls", b"0"), ("d.1/a.JPG", b"i"), ("d.1/a.txt", b"t"), ("d.1/a.json", b"{}"), ("d.1/.hidden", b"")]
    (sample,), counts = _read(write_shard(tmp_path / "a.tar", members))
    assert sample.key == "d.1/a"
    assert sample.members == {"jpg": b"i", "txt": b"t", "json": b"{}"}
    assert sample.image == b"i"
    assert counts == {}


def test_a_stride_takes_every_sample_once_and_reads_no_other(shard: Path) -> None:
    parts = [_keys(_read(shard, start=start, step=3)[0]) for start in range(3)]
    assert parts == [["v", "y"], ["w", "z"], ["x"]]


def test_strides_agree_on_numbers_where_keys_repeat(tmp_path: Path) -> None:
    members = [*make_pair("a"), *make_pair("a"), *make_pair("b"), *make_pair("c")]
    path = write_shard(tmp_path / "a.tar", members)
    taken = sorted(key for start in range(2) for key in _keys(_read(path, start=start, step=2)[0]))
    assert taken[-2:] == ["b", "c"]


def test_a_compressed_shard_is_read_as_a_stream(shard: Path) -> None:
    packed = shard.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert _read(packed) == ([sample._replace(shard=str(packed)) for sample in _read(shard)[0]], {})


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_shard_keeps_what_was_read(shard: Path, packed: bool) -> None:
    half = shard.read_bytes()[: 512 * 13]  # breaks off in a member
    path = shard.with_name("half.tar.gz" if packed else "half.tar")
    path.write_bytes(gzip.compress(half) if packed else half)
    samples, counts = _read(path)
    assert _keys(samples) == ["v", "w", "x"][: len(samples)]
    assert len(samples) >= 2
    assert counts["truncated_tar"] == 1


def test_a_damaged_header_in_the_middle_is_counted_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [*make_pair("a", image=b"i"), *make_pair("b", image=b"i")])
    data = bytearray(path.read_bytes())
    data[4 * 512 : 4 * 512 + 200] = b"\x07" * 200
    path.write_bytes(data)
    samples, counts = _read(path)
    assert _keys(samples) == ["a"]
    assert counts == {"corrupt_tar": 1}


@pytest.mark.parametrize(("data", "reason"), [(b"", "truncated_tar"), (b"no tar" * 500, "corrupt_tar")])
def test_a_file_that_is_no_tar_is_counted(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert _read(path) == ([], {reason: 1})


def test_a_shard_that_vanished_is_counted(tmp_path: Path) -> None:
    assert _read(tmp_path / "gone.tar") == ([], {"unreadable_tar": 1})


def test_the_second_sample_of_a_key_is_dropped(tmp_path: Path) -> None:
    members = [*make_pair("a", caption=b"1"), *make_pair("b"), *make_pair("a", caption=b"2"), *make_pair("a", caption=b"3")]
    samples, counts = _read(write_shard(tmp_path / "a.tar", members))
    assert [(sample.key, sample.members["txt"]) for sample in samples] == [("a", b"1"), ("b", b"photo b")]
    assert counts == {"duplicate_key": 2}


def test_incomplete_samples_are_counted_by_what_is_missing(tmp_path: Path) -> None:
    members = [*make_pair("a")[:1], *make_pair("b")[1:], *make_pair("c"), ("d.cls", b"1")]
    samples, counts = _read(write_shard(tmp_path / "a.tar", members))
    assert _keys(samples) == ["c"]
    assert counts == {"missing_caption": 1, "missing_image": 2}


def test_members_above_the_limit_are_not_read(tmp_path: Path) -> None:
    members = [*make_pair("a"), *make_pair("b", image=bytes(5000)), *make_pair("c", caption=b"x" * 2_000_000)]
    samples, counts = _read(write_shard(tmp_path / "a.tar", members), max_bytes=len(encode_image()) + 500)
    assert _keys(samples) == ["a"]
    assert counts == {"image_too_many_bytes": 1, "caption_too_many_bytes": 1}
