"""Checkpoints are also sent to a URL, count there only when whole, and come back where the local ones are gone."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from toy_run import run_toy, settings

from sycoca.train.checkpoint.mirror import Mirror, order_candidates
from sycoca.train.run import Evaluation
from sycoca.types import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What a run says: its console does not hand lines on to pytest."""
    monkeypatch.setattr("sycoca.train.run.set_up_console", lambda is_main: None)
    caplog.set_level(logging.INFO, "sycoca")
    return caplog


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place."""
    if request.param == "file":
        yield f"file://{tmp_path}/mirror"
        return
    yield "memory://mirror/run"
    files = fsspec.filesystem("memory")
    if files.exists("/mirror"):
        files.rm("/mirror", recursive=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints/last/model.safetensors")


def test_every_checkpoint_is_mirrored_and_the_newest_and_the_best_are_kept(url: str, tmp_path: Path):
    scores = iter([9.0, 1.0, 2.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    evaluation = Evaluation(lambda: {"score": next(scores)}, every=1, choose_by="score")
    run_toy(settings(tmp_path, num_steps=8, num_kept=2, mirror=url), evaluation=evaluation)
    mirror = Mirror(url)
    assert mirror.names() == ["step_00000008", "step_00000006", "step_00000001"]
    mirror.fetch("step_00000001", tmp_path / "again")
    for path in (tmp_path / "checkpoints/best").rglob("*"):
        if path.is_file():
            again = tmp_path / "again" / path.relative_to(tmp_path / "checkpoints/best")
            assert again.read_bytes() == path.read_bytes()


def test_the_checksums_arrive_last_and_a_folder_without_them_does_not_count(tmp_path: Path):
    run_toy(settings(tmp_path, num_steps=4, mirror="memory://marks"))
    files = fsspec.filesystem("memory")
    created = {path: files.info(path)["created"] for path in files.find("/marks/step_00000004")}
    assert max(created, key=lambda path: created[path]) == "/marks/step_00000004/checksums.json"
    files.rm_file("/marks/step_00000004/checksums.json")
    assert Mirror("memory://marks").names() == ["step_00000002"]


def test_auto_continues_exactly_from_the_mirror_where_the_local_folder_is_empty(url: str, tmp_path: Path):
    run_toy(settings(tmp_path / "whole", num_steps=6))
    run_toy(settings(tmp_path / "run", num_steps=6, mirror=url))
    _lose(tmp_path / "run", url, after="step_00000004")
    result = run_toy(settings(tmp_path / "run", num_steps=6, mirror=url))
    assert result["step"] == 6
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["last", "step_00000004", "step_00000006"]
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_damaged_mirrored_checkpoint_is_named_and_the_one_before_it_used(
    url: str, tmp_path: Path, log: pytest.LogCaptureFixture
):
    run_toy(settings(tmp_path, num_steps=4, mirror=url))
    shutil.rmtree(tmp_path / "checkpoints")
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/step_00000004/model.safetensors", b"damaged")
    run_toy(settings(tmp_path, num_steps=4, mirror=url))
    assert "step_00000004 is damaged and left alone: model.safetensors has 7 bytes" in log.text
    assert "step_00000002 at step 2" in log.text


def test_a_run_continues_from_the_url_of_a_checkpoint(url: str, tmp_path: Path):
    run_toy(settings(tmp_path / "first", num_steps=4, mirror=url))
    run_toy(settings(tmp_path / "second", num_steps=4, resume=f"{url}/step_00000002"))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(second[name], value) for name, value in first.items())
    with pytest.raises(CheckpointError, match=r"run\.resume: no checkpoint at .*step_00000009"):
        run_toy(settings(tmp_path / "third", num_steps=4, resume=f"{url}/step_00000009"))


def test_a_mirror_that_cannot_be_written_warns_on_the_way_and_fails_at_the_end(tmp_path: Path, log: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("in the way")
    mirror = f"file://{tmp_path}/file/run"
    with pytest.raises(CheckpointError, match=r"file/run/step_00000004 could not be written: .*the local one is whole"):
        run_toy(settings(tmp_path, num_steps=4, mirror=mirror))
    assert "step_00000002 could not be written" in log.text
    assert (tmp_path / "checkpoints/last").resolve().name == "step_00000004"


def test_an_unknown_kind_of_url_is_refused_before_the_first_step(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.mirror: nowhere://x cannot be opened"):
        run_toy(settings(tmp_path, mirror="nowhere://x"))


def test_what_was_written_last_comes_first_and_newer_leftovers_of_an_earlier_run_never():
    assert order_candidates(["step_1", "step_3", "step_2"], None) == ["step_3", "step_2", "step_1"]
    assert order_candidates(["step_1", "step_3", "step_2"], "step_2") == ["step_2", "step_1"]


def _lose(folder: Path, url: str, *, after: str) -> None:
    """The whole local folder, and in the mirror what came after a checkpoint."""
    shutil.rmtree(folder / "checkpoints")
    files, root = fsspec.core.url_to_fs(url)
    for name in Mirror(url).names():
        if name > after:
            files.rm(f"{root}/{name}", recursive=True)
