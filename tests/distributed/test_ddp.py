"""Gradients do not depend on the number of processes: world sizes 1, 2 and 4 under DDP against one plain process."""

from typing import Any

import pytest
import torch
from builders import assert_same_gradients, build_task, gradients
from ddp_worker import CASES, find_all, whole_batch

from tests.forks import run_ranks

pytestmark = pytest.mark.slow
WORLDS = [1, 2, 4]


@pytest.fixture(scope="module")
def found_at() -> dict[int, Any]:
    """What rank 0 found at each world size."""
    return {world: run_ranks(find_all, world, ACCELERATE_USE_CPU="true")[0] for world in WORLDS}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """One plain process with the whole batch, in one piece."""
    results = {}
    for case, (configs, _) in CASES.items():
        task = build_task(configs)
        loss, metrics = task(whole_batch())
        loss.backward()
        results[case] = {"loss": loss.detach(), "metrics": metrics, "gradients": gradients(task)}
    return results


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_at_any_world_size_are_the_one_process_gradients(found_at: dict, expected: dict, world: int, case: str):
    """To 1e-5, temperature and attentive masks included."""
    found = found_at[world]["gradients"][case]
    assert_same_gradients(found["gradients"], expected[case]["gradients"], tolerance=1e-5)
    assert found["difference_between_ranks"] == 0.0


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(found_at: dict, expected: dict, world: int, case: str):
    found = found_at[world]["gradients"][case]
    torch.testing.assert_close(found["loss"], expected[case]["loss"])
    torch.testing.assert_close(found["metrics"], expected[case]["metrics"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3])
def test_contrast_in_chunks_is_the_whole_matrix_on_every_rank(found_at: dict, world: int, is_masked: bool, chunk_rows: int):
    """In float64. The temperature is used in float32, and so is its gradient."""
    found = found_at[world]["contrast"][is_masked]
    assert len(found[0]) == world
    for chunked, whole in zip(found[chunk_rows], found[0], strict=True):
        torch.testing.assert_close(chunked.pop("scale"), whole["scale"], rtol=1e-6, atol=1e-7)
        assert whole["image"].dtype == torch.float64
        for name, value in chunked.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_the_first_log_line_says_what_was_launched(found_at: dict, world: int):
    line = found_at[world]["gradients"]["itc"]["engine"]
    assert f"{world} process{'es' if world > 1 else ''} on cpu" in line and f"batch {8 // world} x {world} = 8" in line


@pytest.mark.parametrize("world", WORLDS)
def test_gathered_rows_stand_in_rank_order_and_send_their_gradients_home(found_at: dict, world: int):
    talk = found_at[world]["talk"]
    assert talk["gathered"][:, 0].tolist() == [float(rank) for rank in range(world) for _ in range(2)]
    assert (talk["gradient"] == sum(range(1, world + 1))).all()


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_with_different_numbers_of_rows_can_be_gathered(found_at: dict, world: int):
    talk = found_at[world]["talk"]
    assert talk["uneven"].shape == (sum(range(world)), 2)
    assert talk["uneven"][:, 0].tolist() == [float(rank) for rank in range(world) for _ in range(rank)]
    assert talk["objects"] == [f"rank {rank}" for rank in range(world)]
    assert talk["any"] == [True, False]
