"""The cache of shards: fetched once a machine, whatever happens to its files, and never larger than it may be."""

import multiprocessing
import os
import random
import threading
from pathlib import Path

import pytest
from faulty_server import FaultyServer, serve

from sycoca.data.cache import Access, CacheConfig, open_cached
from sycoca.data.transfers import RemoteConfig, RemoteError

QUICK = RemoteConfig(num_attempts=60, backoff_seconds=0.001, max_backoff_seconds=0.01)
FAULTS = ("drop", "truncate", "error", "reset")
SIZE = 100_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    return folder


def _access(folder: Path, *, num_files: float = 100) -> Access:
    return Access(QUICK, CacheConfig(folder=str(folder), max_gb=num_files * SIZE / 1e9))


def _read(url: str, access: Access) -> tuple[bytes, bool]:
    file, is_kept = open_cached(url, access)
    with file:
        return file.read(), is_kept


def _kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_shard_is_fetched_once_and_then_read_from_the_folder(files: Path, tmp_path: Path) -> None:
    server = FaultyServer(files, seed=1, fault_share=0.5, faults=FAULTS)
    with serve(server) as url:
        assert _read(f"{url}/0.tar", _access(tmp_path)) == ((files / "0.tar").read_bytes(), True)
        num_requests = server.requested["0.tar"]
        for _ in range(3):
            assert _read(f"{url}/0.tar", _access(tmp_path)) == ((files / "0.tar").read_bytes(), True)
    assert server.requested["0.tar"] == num_requests
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".shard"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "grown"])
def test_a_damaged_file_is_fetched_again(files: Path, tmp_path: Path, damage: str) -> None:
    server = FaultyServer(files)
    with serve(server) as url:
        _read(f"{url}/0.tar", _access(tmp_path))
        (kept,) = tmp_path.glob("*.shard")
        data = bytearray(kept.read_bytes())
        data[SIZE // 2] ^= 1
        kept.write_bytes({"cut": data[:-1], "flipped": data, "grown": kept.read_bytes() + b"x"}[damage])
        assert _read(f"{url}/0.tar", _access(tmp_path)) == ((files / "0.tar").read_bytes(), True)
    assert server.requested["0.tar"] == 2


def test_what_was_used_longest_ago_goes_first(files: Path, tmp_path: Path) -> None:
    server = FaultyServer(files)
    access = _access(tmp_path, num_files=3.5)
    with serve(server) as url:
        for number in (0, 1, 2, 0, 3, 4, 0):  # 1 goes for 3, 2 goes for 4
            _read(f"{url}/{number}.tar", access)
            assert _kept_bytes(tmp_path) <= 3.5 * SIZE
    assert [server.requested[f"{number}.tar"] for number in range(5)] == [1, 1, 1, 1, 1]
    assert len(list(tmp_path.glob("*.shard"))) == 3


def test_files_in_use_are_not_removed_and_what_finds_no_room_is_not_kept(files: Path, tmp_path: Path) -> None:
    access = _access(tmp_path, num_files=2.5)
    with serve(FaultyServer(files)) as url:
        first, _ = open_cached(f"{url}/0.tar", access)
        second, _ = open_cached(f"{url}/1.tar", access)
        assert _read(f"{url}/2.tar", access) == ((files / "2.tar").read_bytes(), False)
        first.close()
        assert _read(f"{url}/2.tar", access) == ((files / "2.tar").read_bytes(), True)
        assert second.read() == (files / "1.tar").read_bytes()
        second.close()


def test_a_shard_larger_than_the_cache_or_of_unsaid_length_is_streamed(files: Path, tmp_path: Path) -> None:
    server = FaultyServer(files)
    with serve(server) as url:
        assert _read(f"{url}/0.tar", Access(QUICK)) == ((files / "0.tar").read_bytes(), False)
        assert _read(f"{url}/0.tar", _access(tmp_path, num_files=0.5)) == ((files / "0.tar").read_bytes(), False)
        assert _read(f"{url}/0.tar", _access(tmp_path / "just", num_files=1)) == ((files / "0.tar").read_bytes(), True)
        server.says_length = False
        assert _read(f"{url}/1.tar", _access(tmp_path / "none")) == ((files / "1.tar").read_bytes(), False)
    assert _kept_bytes(tmp_path / "none") == 0


def test_what_cannot_be_fetched_leaves_nothing_behind(files: Path, tmp_path: Path) -> None:
    server = FaultyServer(files)
    server.broken["0.tar"] = "truncate"
    server.draw_share = lambda: 0.0
    with serve(server) as url, pytest.raises(RemoteError):
        _read(f"{url}/0.tar", _access(tmp_path))
    assert _kept_bytes(tmp_path) == 0


def test_what_a_killed_process_left_half_is_no_hindrance(files: Path, tmp_path: Path) -> None:
    with serve(FaultyServer(files)) as url:
        _read(f"{url}/0.tar", _access(tmp_path))
        (kept,) = tmp_path.glob("*.shard")
        half = tmp_path / f"{kept.name.partition('.')[0]}.partial"
        os.replace(kept, half)
        (tmp_path / "of_another.partial").write_bytes(bytes(2 * SIZE))
        assert _read(f"{url}/0.tar", _access(tmp_path, num_files=2)) == ((files / "0.tar").read_bytes(), True)
    assert not list(tmp_path.glob("*.partial"))


def _read_many(url: str, folder: str, expected: str, numbers: list[int]) -> None:
    """In a process of its own; exits with 1 where a byte differs or the folder outgrows its limit."""
    access = _access(Path(folder), num_files=3.5)
    for number in numbers:
        data, _ = _read(f"{url}/{number}.tar", access)
        assert data == (Path(expected) / f"{number}.tar").read_bytes()
        assert len([name for name in os.listdir(folder) if name.endswith(".shard")]) <= 3


@pytest.mark.parametrize(("fault_share", "num_reads"), [(0.2, 12), (0.0, 200)])
def test_several_processes_share_the_folder(files: Path, tmp_path: Path, fault_share: float, num_reads: int) -> None:
    """Many reads without faults: a shard that took its name while another process counted was once not counted."""
    server = FaultyServer(files, seed=4, fault_share=fault_share, faults=FAULTS)
    context = multiprocessing.get_context("fork")
    orders = [random.Random(seed).choices(range(6), k=num_reads) for seed in range(4)]
    with serve(server) as url:
        readers = [context.Process(target=_read_many, args=(url, str(tmp_path), str(files), order)) for order in orders]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout=120)
            reader.kill()
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert _kept_bytes(tmp_path) <= 3.5 * SIZE


def test_readers_of_one_shard_wait_for_one_transfer(files: Path, tmp_path: Path) -> None:
    server = FaultyServer(files)
    found: list[tuple[bytes, bool]] = []
    with serve(server) as url:
        readers = [threading.Thread(target=lambda: found.append(_read(f"{url}/0.tar", _access(tmp_path)))) for _ in range(6)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout=60)
    assert found == [((files / "0.tar").read_bytes(), True)] * 6
    assert server.requested["0.tar"] == 1
