"""Two real processes under DDP and ZeRO: bad batches are left out by all, norms are the whole batch's, a sleeper is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosis_worker import BAD_GRADIENT, BAD_LOSS, find_under_ddp, find_under_zero, skip_bad_batches

from tests.forks import run_ranks

pytestmark = pytest.mark.slow
ENGINES = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that two ranks under DDP left, and what rank 0 found."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    return folder, run_ranks(find_under_ddp, 2, folder, ACCELERATE_USE_CPU="true")[0]


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found at each ZeRO stage."""
    return run_ranks(find_under_zero, 2, tmp_path_factory.mktemp("zero"))[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One plain process with the whole batch."""
    return skip_bad_batches(tmp_path_factory.mktemp("plain"), 1)


@pytest.fixture
def found_by(ddp, zero) -> dict[str, Any]:
    return {"DDP": ddp[1], **zero}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_loss_on_one_rank_or_a_bad_gradient_is_left_out_by_all(engine: str, found_by, expected):
    found = found_by[engine]
    assert found["engine"] == engine
    is_sound = [step not in (BAD_LOSS, BAD_GRADIENT) for step in (1, 2, 3, 4)]
    assert found["flags"] == expected["flags"] == [(sound, sound) for sound in is_sound]
    torch.testing.assert_close(found["weights"], dict(expected["weights"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["DDP", "ZeRO-1", "ZeRO-2"])
def test_gradient_norms_of_objectives_do_not_depend_on_the_number_of_ranks(engine: str, found_by, expected):
    assert expected["norms"].keys() == {"itc", "ic"}
    torch.testing.assert_close(found_by[engine]["norms"], expected["norms"], rtol=1e-3, atol=0)


def test_gradient_norms_are_refused_under_zero_3(zero):
    assert "run.grad_norms_every: ZeRO-3" in zero["ZeRO-3"]["refused"]


def test_stopping_ends_every_rank_with_the_objective_and_all_keys(ddp):
    folder, found = ddp
    assert len(found["errors"]) == 2 and found["errors"][0] == found["errors"][1]
    assert f"step {BAD_LOSS}: not finite: rank 0: " in found["errors"][0]
    assert "itc/loss" in found["errors"][0] and "ic/loss" in found["errors"][0].partition("rank 1: ")[2]
    for row in range(4):
        assert f"step2_image_{row}" in found["errors"][0]
    written = json.loads((folder / "stopped" / f"step_{BAD_LOSS}_rank_1.json").read_text(encoding="utf-8"))
    assert written["keys"] == ["step2_image_2", "step2_image_3"] and written["keys_with_bad_pixels"] == ["step2_image_3"]
    assert [len(row) for row in written["tokens"]] == [4, 5] and written["metrics"]["ic/loss"] is None


def test_a_bad_gradient_is_written_down_with_the_losses_that_were_sound(ddp):
    written = json.loads((ddp[0] / "bad_batches" / f"step_{BAD_GRADIENT}_rank_1.json").read_text(encoding="utf-8"))
    assert written["not_finite"] == ["grad_norm"] and written["metrics"]["ic/loss"] > 0


def test_a_rank_that_sleeps_in_its_data_loader_is_named_with_phase_samples_and_stack(ddp):
    said = [(ddp[0] / f"stderr_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert "furthest behind: rank 1; the others wait for it" in said[0] and "all ranks:" not in said[1]
    sleeper, waiting = ([x for x in said[0].splitlines() if x.startswith(f"  rank {rank}: step 2")] for rank in (1, 0))
    assert any("waiting for data for" in line and "step1_image_2, step1_image_3; its time: " in line for line in sleeper)
    assert any("step2_image_0, step2_image_1" in line and "step 2, waiting" not in line for line in waiting)
    assert "in step 2, waiting for data" in said[1] and ", in sleepy" in said[1] and "time.sleep(0.1)" in said[1]
    state = json.loads((ddp[0] / "state" / "rank_1.json").read_text(encoding="utf-8"))
    assert state["phase"] == "done" and state["step"] == 4 and state["seconds"]["waiting for data"] > 0.9
