"""Streams over a server that fails: what can be healed is healed to the byte, what cannot be is named."""

import random
import time
from pathlib import Path
from random import Random

import fsspec
import pytest
from faulty_server import FaultyServer, serve
from fsspec.implementations.local import LocalFileOpener

from sycoca.data.remote import RemoteFile, expand_url, open_remote
from sycoca.data.transfers import RemoteConfig, RemoteError
from sycoca.types import DataError

# a busy machine stalls too: many attempts, and a short limit only where a stall is waited for
QUICK = RemoteConfig(num_attempts=60, stall_seconds=0.3, backoff_seconds=0.001, max_backoff_seconds=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.bin").write_bytes(random.Random(1).randbytes(300_001))
    (folder / "empty.bin").write_bytes(b"")
    return folder


def _read(url: str, config: RemoteConfig = QUICK) -> bytes:
    with open_remote(url, config, seed="0").buffered() as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


@pytest.mark.parametrize("fault", ["drop", "truncate", "stall", "error", "reset"])
@pytest.mark.parametrize("takes_ranges", [True, False])
def test_every_fault_is_healed_to_the_byte(folder: Path, fault: str, takes_ranges: bool) -> None:
    server = FaultyServer(folder, seed=2, fault_share=0.6, faults=(fault,))
    server.takes_ranges = takes_ranges
    with serve(server) as url:
        for _ in range(3):
            assert _read(f"{url}/a.bin") == (folder / "a.bin").read_bytes()
    assert server.seen[fault] > 0
    if fault in ("drop", "truncate", "stall"):
        assert (server.seen["range"] > 0) == takes_ranges


def test_an_empty_file_and_one_of_unsaid_length_end(folder: Path) -> None:
    server = FaultyServer(folder)
    server.says_length = False
    with serve(server) as url:
        assert _read(f"{url}/a.bin") == (folder / "a.bin").read_bytes()
        server.says_length = True
        assert _read(f"{url}/empty.bin") == b""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("drop", "remote_truncated"), ("truncate", "remote_truncated"), ("stall", "remote_stalled"),
     ("error", "remote_server_error"), ("reset", "remote_dropped")],
)  # fmt: skip
def test_a_fault_that_stays_is_given_up_under_its_name(folder: Path, fault: str, reason: str) -> None:
    server = FaultyServer(folder)
    server.broken["a.bin"] = fault
    server.draw_share = lambda: 0.0
    with serve(server) as url, pytest.raises(RemoteError) as caught:
        _read(f"{url}/a.bin", QUICK.model_copy(update={"num_attempts": 3, "stall_seconds": 0.2 if fault == "stall" else 60}))
    assert caught.value.reason == reason
    assert server.requested["a.bin"] == 3


def test_a_file_that_is_not_there_is_not_asked_for_again(folder: Path) -> None:
    server = FaultyServer(folder)
    with serve(server) as url, pytest.raises(RemoteError, match="404") as caught:
        _read(f"{url}/gone.bin")
    assert caught.value.reason == "remote_refused"
    assert server.requested["gone.bin"] == 1


def test_nobody_listening_is_given_up(folder: Path) -> None:
    with serve(FaultyServer(folder)) as url:
        pass
    with pytest.raises(RemoteError) as caught:
        _read(f"{url}/a.bin", QUICK.model_copy(update={"num_attempts": 3}))
    assert caught.value.reason == "remote_dropped"


def test_a_file_that_changes_while_it_is_read_is_not_pieced_together(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(4_000_000))
    with serve(FaultyServer(tmp_path)) as url, open_remote(f"{url}/a.bin", QUICK, seed="0") as stream:
        assert stream.read(10) == bytes(10)
        (tmp_path / "a.bin").write_bytes(b"\1" * 4_000_000)
        stream._break_off()
        with pytest.raises(RemoteError) as caught:
            stream.read(10)
    assert caught.value.reason == "remote_changed"


def test_pauses_double_up_to_their_limit_and_come_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    config = RemoteConfig(num_attempts=6, backoff_seconds=1, max_backoff_seconds=5)

    def draw(seed: int) -> list[float]:
        pauses.clear()
        with pytest.raises(RemoteError):
            RemoteFile("http://127.0.0.1:1/x", config, Random(seed)).read(1)
        return list(pauses)

    first = draw(3)
    assert all(longest / 2 <= pause <= longest for pause, longest in zip(first, [1, 2, 4, 5, 5], strict=True))
    assert draw(3) == first != draw(4)


def test_other_file_systems_are_read_through_fsspec_from_where_they_broke_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Random(5)
    places: list[int] = []
    whole_read = LocalFileOpener.read

    def read(file: LocalFileOpener, size: int = -1) -> bytes:
        fault = calls.choice(["ok", "ok", "error", "stall"])
        if fault == "error":
            raise RuntimeError("as some file systems do")
        if fault == "stall":
            time.sleep(0.5)
        places.append(file.tell())
        return whole_read(file, min(size, 50_000))

    monkeypatch.setattr(LocalFileOpener, "read", read)
    assert _read(f"file://{folder}/a.bin") == (folder / "a.bin").read_bytes()
    assert set(range(0, 300_001, 50_000)) <= set(places)
    with pytest.raises(RemoteError) as caught:
        _read("memory://shards/gone.tar")
    assert caught.value.reason == "remote_refused"


def test_urls_with_wildcards_are_listed_through_fsspec() -> None:
    for name in ("b", "a", "c"):
        fsspec.filesystem("memory").pipe(f"/listed/{name}.tar", b"x")
    assert expand_url("memory://listed/[ab].tar") == ["memory:///listed/a.tar", "memory:///listed/b.tar"]
    assert expand_url("https://host/a.tar?x=1") == ["https://host/a.tar?x=1"]
    with pytest.raises(DataError, match="no file matches"):
        expand_url("memory://listed/*.gz")


@pytest.mark.parametrize(
    ("url", "message"), [("nothing://a/b.tar", "Protocol not known"), ("http://127.0.0.1:1/*.tar", "http")]
)
def test_a_url_that_cannot_be_read_here_says_what_to_install(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_url(url)
