"""Gradients are those of one process with the whole batch, whatever the engine, the number of processes and of chunks.

Dropout and attentive masks are on. Each rank seeds its own dropout, so the reference is a plain loop over the ranks' shares and
their chunks, each encoded in the same order with the same seeds, nothing recomputed, and one contrastive batch of them all.
"""

import pytest
import torch
from builders import assert_same_gradients, gradients
from gradient_worker import ENGINES, ROWS, Case, build_noisy_task, find_gradients, rows_of, seed_dropout
from torch import Tensor

from sycoca.objectives.base import Objective
from sycoca.train.task import PretrainTask, split_batch
from sycoca.types import Batch, Features
from tests.forks import run_ranks

QUICK: dict[int, list[Case]] = {2: [(engine, "sycoca", 4) for engine in ENGINES]}
WHOLE: dict[int, list[Case]] = {
    world: [(engine, row, num_chunks) for engine in ENGINES for row in ROWS for num_chunks in (1, 4)] for world in (1, 2, 4)
}


def expected(row: str, world: int, num_chunks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process."""
    task = build_noisy_task(row, num_chunks=1)
    pieces: list[Batch] = []
    encoded: list[Features] = []
    separable: dict[str, list[Tensor]] = {name: [] for name, member in task.members().items() if member.is_separable}
    for number in range(world):
        seed_dropout(number)
        for piece in split_batch(rows_of(number, world), num_chunks):
            pieces.append(piece)
            encoded.append(task.encode(piece))
            for name, losses in separable.items():
                losses.append(task.members()[name](task.model, piece, encoded[-1])[0])
    loss = torch.zeros(())
    for name, member in task.members().items():
        part = mean_by_mass(member, pieces, separable[name]) if name in separable else contrast(task, member, encoded)
        loss = loss + task.weights[name] * part
    loss.backward()
    return loss.detach(), gradients(task)


def mean_by_mass(member: Objective, pieces: list[Batch], losses: list[Tensor]) -> Tensor:
    """The loss of the whole batch: token by token for captions, image by image for pixels."""
    mass = torch.stack([member.mass(piece) for piece in pieces])
    return (torch.stack(losses) * mass).sum() / mass.sum()


def contrast(task: PretrainTask, member: Objective, encoded: list[Features]) -> Tensor:
    """All pairs against all pairs."""
    rows = [torch.cat([getattr(features, name) for features in encoded]) for name in ("image_BE", "text_BE")]
    return member(task.model, rows_of(0, 1), Features(torch.zeros(0), torch.zeros(0), None, *rows))[0]


def check(world: int, cases: list[Case]) -> None:
    for case, found in run_ranks(find_gradients, world, cases)[0].items():
        engine, row, num_chunks = case
        loss, wanted = expected(row, world, num_chunks)
        name = f"{case} with {world} processes"
        assert found["engine"] == ("plain" if (engine, world) == ("DDP", 1) else engine), name
        assert found["difference"] == 0.0, name
        torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=0, msg=name)
        assert_same_gradients(found["gradients"], wanted, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", QUICK)
def test_gradients_under_every_engine_are_exact_with_dropout_and_attentive_masks(world: int):
    """Two processes with four recomputed chunks each; the temperature is among the gradients."""
    check(world, QUICK[world])


@pytest.mark.soak
@pytest.mark.parametrize("world", WHOLE)
def test_gradients_are_exact_in_the_whole_matrix(world: int):
    """One, two and four processes, every engine, in one piece and in four chunks, the objectives together and apart."""
    check(world, WHOLE[world])


def test_dropout_matters_for_what_is_compared():
    first, _ = expected("sycoca", 2, 1)
    other, _ = expected("sycoca", 2, 4)
    assert not torch.isclose(first, other)
