"""Another number of processes or workers: what the old ones had left of an epoch is read once by the new ones."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from shard_maker import make_config, write_shards

from sycoca.data import pipeline
from sycoca.data.elastic import Carried, Layout, Unit, collect, load_positions, walk_units
from sycoca.data.order import deal_shards, every_nth
from sycoca.data.pipeline import DataConfig, build_train_loader
from sycoca.data.position import PositionTracker
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.types import CheckpointError

SIZES = [5, 9, 7, 11, 6, 8, 3, 10]
EVERY = Counter(f"{shard}_{i}" for shard, num in enumerate(SIZES) for i in range(num))


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", SIZES)


@pytest.fixture(autouse=True)
def _tell_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys say their epoch: a batch may hold samples of two."""
    decode = pipeline._TrainStream._decode

    def told(self: Any, item: Any, epoch: int, drops: Any) -> Any:
        sample = decode(self, item, epoch, drops)
        return sample._replace(key=f"{epoch}:{sample.key}")

    monkeypatch.setattr(pipeline._TrainStream, "_decode", told)


def _run(
    config: DataConfig, clip: Tokenizer, states: Path | None, out: Path, *, worlds: tuple[int, int], num_batches: list[int]
) -> Counter[tuple[int, str]]:
    """Simulated ranks, each making its number of batches from the states of the ranks before it; what they saw, by epoch."""
    seen: Counter[tuple[int, str]] = Counter()
    was, now = worlds
    out.mkdir()
    for rank in range(now):
        start = load_positions(states, rank, was_world_size=was, world_size=now) if states is not None else None
        loader = build_train_loader(config, clip, seed=3, rank=rank, world_size=now, resume=start)
        tracker = PositionTracker(start)
        for batch in islice(loader, num_batches[rank]):
            tracker.update(batch["position"])
            seen.update((int(key.partition(":")[0]), key.partition(":")[2]) for key in batch["key"])
        (out / f"rank_{rank}.json").write_text(json.dumps(tracker.state()))
    return seen


def _config(folder: Path, **changes: Any) -> DataConfig:
    return make_config(folder, batch_size=1, shards_per_group=2, **changes)


@pytest.mark.parametrize(
    ("first", "second"), [((2, 1), (1, 1)), ((1, 1), (3, 1)), ((3, 1), (2, 1)), ((1, 2), (1, 3)), ((2, 2), (3, 1))]
)
def test_each_sample_comes_once_an_epoch_before_and_after_another_topology(
    folder: Path, clip: Tokenizer, tmp_path: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    (was, was_workers), (now, now_workers) = first, second
    before = _config(folder, num_workers=was_workers if was_workers > 1 else 0)
    after = _config(folder, num_workers=now_workers if now_workers > 1 else 0).model_copy(update={"batch_size": was})
    before = before.model_copy(update={"batch_size": now})
    seen = _run(before, clip, None, tmp_path / "a", worlds=(0, was), num_batches=[12 // now] * was)
    seen += _run(after, clip, tmp_path / "a", tmp_path / "b", worlds=(was, now), num_batches=[100 // (was * now)] * now)
    epochs = [{key: num for (epoch, key), num in seen.items() if epoch == number} for number in range(2)]
    assert epochs[0] == EVERY
    assert set(epochs[1].values()) == {1}


def test_the_topology_may_change_again_before_the_epoch_ends(folder: Path, clip: Tokenizer, tmp_path: Path) -> None:
    config = _config(folder)
    seen: Counter[tuple[int, str]] = Counter()
    states, was = None, 0
    for number, (now, num) in enumerate([(2, 6), (3, 4), (1, 12), (4, 3), (1, 40)]):
        chosen = config.model_copy(update={"batch_size": 12 // now})
        out = tmp_path / str(number)
        seen += _run(chosen, clip, states, out, worlds=(was, now), num_batches=[max(1, num // (12 // now))] * now)
        states, was = tmp_path / str(number), now
    assert {key: num for (epoch, key), num in seen.items() if epoch == 0} == EVERY


def test_a_run_on_dealt_groups_resumes_exactly(folder: Path, clip: Tokenizer, tmp_path: Path) -> None:
    config = _config(folder)
    _run(config.model_copy(update={"batch_size": 2}), clip, None, tmp_path / "a", worlds=(0, 2), num_batches=[5, 5])
    config = config.model_copy(update={"batch_size": 4})
    start = load_positions(tmp_path / "a", 0, was_world_size=2, world_size=1)

    def keys(resume: Any, num: int) -> list[Any]:
        return list(islice(build_train_loader(config, clip, seed=3, rank=0, world_size=1, resume=resume), num))

    whole = keys(start, 16)
    for stop in (1, 4, 9, 13):
        tracker = PositionTracker(start)
        for batch in whole[:stop]:
            tracker.update(batch["position"])
        again = keys(json.loads(json.dumps(tracker.state())), 16 - stop)
        assert [batch["key"] for batch in again] == [batch["key"] for batch in whole[stop:]]


def test_other_streams_than_one_may_be_epochs_ahead(tmp_path: Path, folder: Path, clip: Tokenizer) -> None:
    """Ranks make as many steps, but their shards are not of one size."""
    config = _config(folder).model_copy(update={"batch_size": 2})
    seen = _run(config, clip, None, tmp_path / "a", worlds=(0, 2), num_batches=[40, 8])
    last = max(epoch for epoch, _ in seen)
    config = config.model_copy(update={"batch_size": 4})
    seen += _run(config, clip, tmp_path / "a", tmp_path / "b", worlds=(2, 1), num_batches=[60])
    for number in range(last + 1):
        assert {key: num for (epoch, key), num in seen.items() if epoch == number} == EVERY


@pytest.mark.parametrize(("now", "batch_size", "advice"), [(1, 4, "batch_size=12"), (5, 4, "processes that divides 12")])
def test_another_number_of_samples_a_step_is_refused(
    folder: Path, clip: Tokenizer, tmp_path: Path, now: int, batch_size: int, advice: str
) -> None:
    config = _config(folder).model_copy(update={"batch_size": 4})
    _run(config, clip, None, tmp_path / "a", worlds=(0, 3), num_batches=[1, 1, 1])
    start = load_positions(tmp_path / "a", 0, was_world_size=3, world_size=now)
    with pytest.raises(CheckpointError, match=advice):
        build_train_loader(
            config.model_copy(update={"batch_size": batch_size}), clip, seed=3, rank=0, world_size=now, resume=start
        )


def test_other_data_or_another_seed_are_refused_with_another_topology_too(
    folder: Path, clip: Tokenizer, tmp_path: Path
) -> None:
    _run(_config(folder), clip, None, tmp_path / "a", worlds=(0, 2), num_batches=[1, 1])
    start = load_positions(tmp_path / "a", 0, was_world_size=2, world_size=1)
    config = _config(folder).model_copy(update={"batch_size": 2})
    for seed, changed in ((4, config), (3, config.model_copy(update={"shards_per_group": 3}))):
        with pytest.raises(CheckpointError, match="same seed"):
            build_train_loader(changed, clip, seed=seed, rank=0, world_size=1, resume=start)


def test_positions_that_are_not_all_there_or_say_too_little_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "rank_0.json").write_text(json.dumps({"order": "x", "next_worker": 0, "workers": {}}))
    assert load_positions(tmp_path, 1, was_world_size=2, world_size=2) is None
    assert load_positions(tmp_path, 0, was_world_size=2, world_size=1) is None
    assert load_positions(tmp_path, 0, was_world_size=1, world_size=2) is None
    own = {"order": "x", "next_worker": 0, "workers": {}, "collected": None}
    assert load_positions(tmp_path, 0, was_world_size=1, world_size=1) == own
    assert load_positions(tmp_path, 0, was_world_size=2, world_size=2) == own


@pytest.mark.parametrize("kind", ["shards", "records"])
@pytest.mark.parametrize("seed", range(12))
def test_any_chain_of_topologies_reads_every_sample_of_every_epoch_once(kind: Any, seed: int) -> None:
    """Without files: samples are (shard, number) of shards of random sizes, streams stop wherever they are."""
    generator = Random(seed)
    sizes = [generator.randrange(0, 7) for _ in range(generator.randrange(1, 9))]
    layout = Layout(kind, len(sizes), generator.randrange(1, 4))
    seen: Counter[tuple[int, Any]] = Counter()
    saved: list[dict[str, Any]] = []
    for _ in range(4):
        world_size, num_workers = generator.randrange(1, 4), generator.randrange(1, 3)
        saved = _simulate(layout, sizes, saved, (world_size, num_workers), generator, seen)
    num_whole = min(_first_epoch(saved), 3)
    expected = {(epoch, sample): 1 for epoch in range(num_whole) for sample in _samples(sizes)}
    assert {pair: num for pair, num in seen.items() if pair[0] < num_whole} == expected
    assert set(seen.values()) <= {1}


def _samples(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]


def _first_epoch(states: list[dict[str, Any]]) -> int:
    """The first epoch that is not read to its end by all."""
    collected = collect(states)
    assert collected is not None
    (carried,) = collected["walks"]
    return min((unit.epoch for unit in carried.units), default=carried.first_epoch)


def _simulate(
    layout: Layout, sizes: list[int], saved: list[dict[str, Any]], topology: tuple[int, int], generator: Random, seen: Counter
) -> list[dict[str, Any]]:
    world_size, num_workers = topology
    num_streams = world_size * num_workers
    collected = collect(json.loads(json.dumps(saved))) if saved else None
    carried = Carried.parse(collected["walks"][0] if collected else None)
    facts = {"data": "", "world_size": world_size, "num_workers": num_workers, "batch_size": 1, "layouts": [layout]}
    states = []
    for rank in range(world_size):
        stands = {}
        for worker in range(num_workers):
            stream = layout.stream(rank, worker, world_size=world_size, num_workers=num_workers)
            walk = _walk(layout, sizes, carried, stream, num_streams)
            for sample, stand in islice(walk, generator.randrange(0, 2 * sum(sizes) // num_streams + 2)):
                if sample is not None:
                    seen[stand["epoch"], sample] += 1
                    stands[str(worker)] = stand
        states.append({"workers": stands, "topology": facts, "carried": [carried]})
    return states


def _walk(
    layout: Layout, sizes: list[int], carried: Carried, stream: int, num_streams: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    num_epochs = iter(range(6))

    def read(unit: Unit) -> Iterator[tuple[int, int]]:
        order = list(range(len(sizes)))
        random.Random(unit.epoch).shuffle(order)
        samples = _samples(sizes)
        if layout.kind == "shards":
            parts = deal_shards(order, unit.stream, unit.num_streams)
            parts = parts[unit.group * layout.shards_per_group : (unit.group + 1) * layout.shards_per_group]
            samples = []
            for part in parts:
                is_mine = every_nth(part.start, part.step)
                samples += [(part.shard, number) for number in range(sizes[part.shard]) if is_mine()]
        random.Random(str(unit[:4])).shuffle(samples)
        return islice(iter(samples), unit.start, None, unit.step)

    def end_epoch() -> None:
        next(num_epochs)  # ends walks through nothing

    walk = walk_units(
        carried.of_stream(stream, num_streams), None, first_epoch=carried.first_epoch,
        units_of=lambda epoch: layout.units(epoch, stream, num_streams), read=read, end_epoch=end_epoch,
    )  # fmt: skip
    try:
        yield from walk
    except (StopIteration, RuntimeError):
        return
