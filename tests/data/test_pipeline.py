"""The loaders: one order for one seed, every sample once an epoch, and a resumed run that cannot be told from another."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_maker import encode_image, make_config, make_json, make_pair, write_shard, write_shards

from sycoca.config import parse_config
from sycoca.data.order import deal_shards
from sycoca.data.pipeline import DataConfig, build_eval_loader, build_train_loader
from sycoca.data.position import PositionTracker
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.types import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [5, 9, 7, 11, 6])


def _train(config: Any, clip: Tokenizer, num: int, **changes: Any) -> list[dict[str, Any]]:
    settings = {"seed": 3, "rank": 0, "world_size": 1, **changes}
    return list(islice(build_train_loader(config, clip, **settings), num))


def _keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def _assert_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("image", "token", "length"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["key"] == expected["key"]
    assert {**batch["position"], "worst": None} == {**expected["position"], "worst": None}


def test_a_batch_keeps_its_contract(folder: Path, clip: Tokenizer) -> None:
    (batch,) = _train(make_config(folder, batch_size=3), clip, 1)
    assert batch["image"].shape == (3, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    assert batch["token"].shape == (3, 8)
    assert batch["token"].dtype == batch["length"].dtype == torch.int64
    for key, token_L, length in zip(batch["key"], batch["token"], batch["length"]):
        assert clip.decode(token_L.tolist()).replace(" ", "") == f"photo{key}"
        assert token_L[length - 1] == clip.eos
        assert (token_L[length:] == clip.pad).all()


@pytest.mark.parametrize(("round_to", "max_tokens", "expected"), [(8, 76, 8), (5, 76, 10), (8, 5, 5), (1, 76, 6)])
def test_captions_are_padded_to_a_rounded_length(
    folder: Path, clip: Tokenizer, round_to: int, max_tokens: int, expected: int
) -> None:
    (batch,) = _train(make_config(folder, round_to=round_to, max_tokens=max_tokens), clip, 1)
    assert batch["token"].shape[1] == expected


def test_one_seed_gives_one_order_and_another_seed_another(folder: Path, clip: Tokenizer) -> None:
    first, again = (_train(make_config(folder), clip, 12) for _ in range(2))
    for batch, expected in zip(again, first, strict=True):
        _assert_equal(batch, expected)
    assert _keys(_train(make_config(folder), clip, 12, seed=4)) != _keys(first)


def test_epochs_differ_in_order_and_crops(folder: Path, clip: Tokenizer) -> None:
    batches = _train(make_config(folder, batch_size=1), clip, 76)
    first, second = _keys(batches[:38]), _keys(batches[38:])
    assert sorted(first) == sorted(second)
    assert first != second
    again = 38 + second.index(first[0])
    assert not torch.equal(batches[0]["image"], batches[again]["image"])


def test_loading_processes_give_the_order_of_the_training_process(folder: Path, clip: Tokenizer) -> None:
    inside = _train(make_config(folder, num_workers=0), clip, 12)
    outside = _train(make_config(folder, num_workers=1), clip, 12)
    for batch, expected in zip(outside, inside, strict=True):
        _assert_equal(batch, expected)


def test_the_loader_leaves_the_runs_random_state_alone(folder: Path, clip: Tokenizer) -> None:
    before = torch.get_rng_state()
    _train(make_config(folder, num_workers=1), clip, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 6])
def test_every_sample_of_an_epoch_belongs_to_one_worker(num_shards: int, num_workers: int) -> None:
    parts = [part for worker in range(num_workers) for part in deal_shards(list(range(num_shards)), worker, num_workers)]
    owners = Counter((part.shard, sample) for part in parts for sample in range(part.start, 12, part.step))
    assert owners == {(shard, sample): 1 for shard in range(num_shards) for sample in range(12)}
    assert all(deal_shards(list(range(num_shards)), worker, num_workers) for worker in range(num_workers))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (8, 0), (2, 2)])
def test_each_sample_comes_once_an_epoch_over_ranks_and_workers(
    folder: Path, clip: Tokenizer, world_size: int, num_workers: int
) -> None:
    config = make_config(folder, batch_size=1, num_workers=num_workers)
    seen: Counter[str] = Counter()
    for rank in range(world_size):
        for batch in _train(config, clip, 60, rank=rank, world_size=world_size):
            seen.update(batch["key"] if batch["position"]["epoch"] == 0 else [])
    assert len(seen) == 38
    assert set(seen.values()) == {1}


def test_more_workers_than_shards_share_samples_and_never_hang(tmp_path: Path, clip: Tokenizer) -> None:
    config = make_config(write_shards(tmp_path / "s", [7]), batch_size=2, num_workers=0)
    parts = [{key for batch in _train(config, clip, 9, rank=rank, world_size=3) for key in batch["key"]} for rank in range(3)]
    assert sorted(key for part in parts for key in part) == [f"0_{i}" for i in range(7)]


def test_ranks_with_few_samples_give_as_many_batches_as_the_others(tmp_path: Path, clip: Tokenizer) -> None:
    config = make_config(write_shards(tmp_path / "s", [1, 30]), batch_size=4)
    batches = [_train(config, clip, 15, rank=rank, world_size=2) for rank in range(2)]
    assert [[len(batch["key"]) for batch in part] for part in batches] == [[4] * 15] * 2


def test_fewer_samples_than_workers_is_an_error_not_a_hang(tmp_path: Path, clip: Tokenizer) -> None:
    config = make_config(write_shards(tmp_path / "s", [2]))
    with pytest.raises(DataError, match="no usable sample in 3 epochs"):
        _train(config, clip, 1, rank=4, world_size=5)


@pytest.mark.parametrize(("num_workers", "stops"), [(0, (1, 4, 9, 10, 17)), (1, (5,)), (3, (1, 2, 7, 12))])
def test_a_resumed_stream_is_bit_identical(folder: Path, clip: Tokenizer, num_workers: int, stops: tuple[int, ...]) -> None:
    config = make_config(folder, num_workers=num_workers, shards_per_group=2, batch_size=3)
    whole = _train(config, clip, 24)
    for stop in stops:
        tracker = PositionTracker()
        for batch in whole[:stop]:
            tracker.update(batch["position"])
        resume = json.loads(json.dumps(tracker.state()))
        for batch, expected in zip(_train(config, clip, 24 - stop, resume=resume), whole[stop:], strict=True):
            _assert_equal(batch, expected)


def test_a_stream_resumed_twice_is_still_the_same(folder: Path, clip: Tokenizer) -> None:
    config = make_config(folder, num_workers=2)
    whole = _train(config, clip, 12)
    state = None
    for start in (0, 3, 6, 9):
        tracker = PositionTracker(state)
        batches = _train(config, clip, 3, resume=state)
        for batch, expected in zip(batches, whole[start : start + 3], strict=True):
            _assert_equal(batch, expected)
            tracker.update(batch["position"])
        state = tracker.state()


def test_resuming_counts_no_dropped_sample_twice(tmp_path: Path, clip: Tokenizer) -> None:
    members = [member for i in range(20) for member in make_pair(f"{i}", image=b"" if i % 5 == 0 else None)]
    write_shard(tmp_path / "a.tar", [*members, *make_pair("1"), *make_pair("lost")[1:]])
    config = make_config(tmp_path, batch_size=2, max_bad_share=0.9)
    whole = _train(config, clip, 12)
    assert sum(batch["position"]["num_dropped"].get("empty_image", 0) for batch in whole[:8]) == 4
    for stop in range(1, 10):
        tracker = PositionTracker()
        tracker.update(whole[stop - 1]["position"])
        for batch, expected in zip(_train(config, clip, 12 - stop, resume=tracker.state()), whole[stop:], strict=True):
            _assert_equal(batch, expected)


def test_resuming_into_another_order_is_refused(folder: Path, clip: Tokenizer) -> None:
    tracker = PositionTracker()
    tracker.update(_train(make_config(folder), clip, 1)[0]["position"])
    state = tracker.state()
    with pytest.raises(CheckpointError, match="same seed"):
        _train(make_config(folder), clip, 1, seed=4, resume=state)
    with pytest.raises(CheckpointError, match="workers"):
        _train(make_config(folder, num_workers=2), clip, 1, resume=state)


def test_batches_made_ahead_do_not_move_the_position(folder: Path, clip: Tokenizer) -> None:
    config = make_config(folder, num_workers=2)
    batches = _train(config, clip, 5)  # the workers have prefetched more
    tracker = PositionTracker()
    for batch in batches[:3]:
        tracker.update(batch["position"])
    _assert_equal(_train(config, clip, 1, resume=tracker.state())[0], batches[3])


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (3, 0), (2, 2)])
def test_evaluation_sees_each_sample_once(folder: Path, clip: Tokenizer, world_size: int, num_workers: int) -> None:
    config = make_config(folder, num_workers=num_workers)
    ranks = [
        _keys(list(build_eval_loader(config, rank=rank, world_size=world_size, batch_size=4))) for rank in range(world_size)
    ]
    every = [f"{shard}_{i}" for shard, num in enumerate([5, 9, 7, 11, 6]) for i in range(num)]
    assert [sorted(keys) for keys in ranks] == [sorted(every[rank::world_size]) for rank in range(world_size)]


def test_evaluation_gives_all_captions_and_the_json(tmp_path: Path, clip: Tokenizer) -> None:
    meta = {"captions": ["one", "two"], "label": 3}
    members = [("a.png", encode_image(form="PNG")), ("a.json", make_json(**meta)), *make_pair("b", image=b""), *make_pair("c")]
    write_shard(tmp_path / "a.tar", members)
    (batch,) = build_eval_loader(make_config(tmp_path), rank=0, world_size=1, batch_size=9)
    assert batch["key"] == ["a", "c"]
    assert batch["captions"] == [["one", "two"], ["photo c"]]
    assert batch["meta"] == [meta, {}]
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["num_dropped"] == {"empty_image": 1}


def test_an_unknown_data_key_is_refused_with_its_near_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        parse_config(DataConfig, {"shards": [str(folder)], "batchsize": 3}, source="test")
