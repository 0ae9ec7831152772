"""Shards from records: what they hold, what is refused, what an interruption leaves."""

import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sycoca.data.conversion import Conversion, Resizing, make_shards
from sycoca.data.readers import ImageLocation, Record
from sycoca.data.shard_writer import Sample, write_shards
from sycoca.types import DataError

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 7


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixel_HWC = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixel_HWC).save(folder / f"im{number}.jpg")
    return folder


def build_records(images: Path) -> list[Record]:
    return [
        Record(path.stem, ImageLocation(path), (f"first of {path.stem}", "süß, a second"), {})
        for path in sorted(images.iterdir())
    ]


def run_conversion(records: list[Record], folder: Path, num_processes: int = 1, **changes) -> dict:
    conversion = Conversion(**{"samples_per_shard": 3, **changes})
    return make_shards(records, folder, conversion=conversion, num_processes=num_processes)


def read_members(folder: Path) -> dict[str, bytes]:
    members = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    return members


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "make_shards.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)


def test_all_captions_of_an_image_make_one_sample(images: Path, tmp_path: Path):
    result = run_conversion(build_records(images), tmp_path / "out")
    members = read_members(tmp_path / "out")
    assert (result["num_samples"], result["num_shards"], result["num_bad_rows"]) == (7, 3, {})
    assert members["im4.jpg"] == (images / "im4.jpg").read_bytes()
    assert members["im4.txt"].decode() == "first of im4"
    assert json.loads(members["im4.json"]) == {"captions": ["first of im4", "süß, a second"]}


def test_each_caption_makes_a_sample_whose_key_says_which_image_it_is_of(images: Path, tmp_path: Path):
    assert run_conversion(build_records(images), tmp_path / "out", captions="each")["num_samples"] == 14
    members = read_members(tmp_path / "out")
    assert members["im4#1.txt"].decode() == "süß, a second"
    assert members["im4#0.jpg"] == members["im4#1.jpg"]
    assert not [name for name in members if name.endswith(".json")]


def test_the_index_counts_samples_and_bytes(images: Path, tmp_path: Path):
    run_conversion(build_records(images), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [(shard["name"], shard["num_samples"]) for shard in index["shards"]] == [
        ("00000.tar", 3),
        ("00001.tar", 3),
        ("00002.tar", 1),
    ]
    assert index["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


def test_a_shuffle_seed_permutes_the_samples(images: Path, tmp_path: Path):
    orders = []
    for name, seed in [("source", None), ("one", 1), ("same", 1), ("two", 2)]:
        run_conversion(build_records(images), tmp_path / name, shuffle_seed=seed)
        orders.append([member for member in read_members(tmp_path / name) if member.endswith(".jpg")])
    assert orders[0] == sorted(orders[0])
    assert orders[1] == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[1]) == sorted(orders[3]) == orders[0]


def test_bad_rows_are_counted_and_listed_by_reason(images: Path, tmp_path: Path):
    whole = (images / "im0.jpg").read_bytes()
    (images / "im1.jpg").write_bytes(whole[:-200])
    (images / "im2.jpg").write_bytes(b"<html>not found</html>")
    Image.open(io.BytesIO(whole)).save(images / "im3.jpg", "BMP")
    good = ImageLocation(images / "im0.jpg")
    records = [
        *build_records(images),
        Record("gone", None, ("x",), {}),
        Record("im0", good, ("again",), {}),
        Record("mute", good, (), {}),
        Record("half", good, ("", "said"), {}),
    ]
    expected = {
        ("im1", "truncated_image"),
        ("im2", "unsupported_image"),
        ("im3", "unsupported_image"),
        ("gone", "missing_image"),
        ("im0", "duplicate_key"),
        ("mute", "no_caption"),
        ("half", "empty_caption"),
    }
    result = run_conversion(records, tmp_path / "out")
    lines = (tmp_path / "out" / "bad_rows.tsv").read_text().splitlines()
    assert lines[0] == "key\treason"
    assert {tuple(line.split("\t")) for line in lines[1:]} == expected
    assert sum(result["num_bad_rows"].values()) == len(lines) - 1 == len(expected)
    assert json.loads(read_members(tmp_path / "out")["half.json"])["captions"] == ["said"]
    assert result["num_samples"] == 5


def test_no_good_row_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="'missing_image': 1"):
        run_conversion([Record("gone", None, ("x",), {})], tmp_path / "out")


def test_a_shard_without_a_good_row_is_left_out_and_not_made_again(images: Path, tmp_path: Path):
    for number in range(3):
        (images / f"im{number}.jpg").write_bytes(b"")
    for _ in range(2):
        assert run_conversion(build_records(images), tmp_path / "out")["num_samples"] == 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00001.tar", "00002.tar"]


@pytest.mark.parametrize(
    ("mode", "side", "size"), [("shortest", 10, (15, 10)), ("squash", 10, (10, 10)), ("shortest", 40, (30, 20))]
)
def test_resizing(images: Path, tmp_path: Path, mode: str, side: int, size: tuple[int, int]):
    run_conversion(build_records(images), tmp_path / "out", resizing=Resizing(side, mode))
    content = read_members(tmp_path / "out")["im4.jpg"]
    assert Image.open(io.BytesIO(content)).size == size
    assert (content == (images / "im4.jpg").read_bytes()) == (size == (30, 20))


def test_a_deleted_shard_is_made_again_the_same(images: Path, tmp_path: Path):
    (images / "im1.jpg").write_bytes(b"broken")
    run_conversion(build_records(images), tmp_path / "out", shuffle_seed=5)
    before = read_files(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").unlink()
    run_conversion(build_records(images), tmp_path / "out", shuffle_seed=5)
    assert read_files(tmp_path / "out") == before


def test_finished_shards_are_kept(images: Path, tmp_path: Path):
    run_conversion(build_records(images), tmp_path / "out")
    before = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    run_conversion(build_records(images), tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == before


def test_another_plan_is_refused(images: Path, tmp_path: Path):
    run_conversion(build_records(images), tmp_path / "out")
    with pytest.raises(DataError, match="captions: 'all' there, 'each' now"):
        run_conversion(build_records(images), tmp_path / "out", captions="each")
    with pytest.raises(DataError, match="source"):
        run_conversion(build_records(images)[1:], tmp_path / "out")


def test_a_killed_run_leaves_no_half_shard_and_goes_on(tmp_path: Path):
    """The second shard's job dies, in a process of its own, after it has written a sample."""
    script = """
import os, signal, sys
from pathlib import Path
from sycoca.data.shard_writer import Sample, write_shards

def read_rows(numbers):
    for number in numbers:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Sample(f"k{number}", {"txt": b"x" * 20_000})

write_shards(Path(sys.argv[1]), read_rows, jobs={"0": range(3), "1": range(3, 6)}, plan={}, num_processes=1)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["0.tar"]
    assert (tmp_path / "out" / "1.tar.tmp").exists()

    def read_rows(numbers: range) -> Iterator[Sample]:
        for number in numbers:
            yield Sample(f"k{number}", {"txt": b"x" * 20_000})

    for folder in (tmp_path / "out", tmp_path / "whole"):
        write_shards(folder, read_rows, jobs={"0": range(3), "1": range(3, 6)}, plan={}, num_processes=1)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_two_processes_write_what_one_writes(images: Path, tmp_path: Path):
    run_conversion(build_records(images), tmp_path / "one")
    run_conversion(build_records(images), tmp_path / "two", num_processes=2)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")


@pytest.mark.parametrize("source", ["karpathy", "coco", "table"])
def test_the_tool_reads_every_source(images: Path, tmp_path: Path, source: str):
    names = sorted(path.name for path in images.iterdir())
    rows = [{"filename": name, "split": "train", "sentences": [{"raw": name}]} for name in names]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": rows}))
    rows = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    captions = [{"image_id": number, "caption": name} for number, name in enumerate(names)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": rows, "annotations": captions}))
    (tmp_path / "table.tsv").write_text("file\tsaid\n" + "".join(f"{name}\t{name}\n" for name in names))
    arguments = {
        "karpathy": ["--json", tmp_path / "karpathy.json", "--images", images, "--split", "train"],
        "coco": ["--json", tmp_path / "coco.json", "--images", images],
        "table": ["--file", tmp_path / "table.tsv", "--image-column", "file", "--caption-column", "said", "--root", images],
    }[source]
    done = run_tool(source, *arguments, "--out", tmp_path / "out", "--samples-per-shard", 4)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["num_samples"], result["num_shards"]) == (NUM_IMAGES, 2)
    assert read_members(tmp_path / "out")["im5.txt"] == b"im5.jpg"


def test_the_tool_says_a_users_mistake_in_one_line(images: Path, tmp_path: Path):
    done = run_tool("coco", "--json", tmp_path / "gone.json", "--images", images, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "gone.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1
