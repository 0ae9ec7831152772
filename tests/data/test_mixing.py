"""Several data sets in one stream: shares by weight, captions by each one's own choice, exact positions."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_maker import make_config, make_json, make_pair, write_shard

from sycoca.config import parse_config
from sycoca.data.elastic import load_positions
from sycoca.data.mixing import draw_source
from sycoca.data.pipeline import DataConfig, build_eval_loader, build_train_loader
from sycoca.data.position import DropCounter, PositionTracker
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.train.validation import EvaluateConfig, held_out
from sycoca.types import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys a_* in two shards, b_* in three; each sample has a txt and another caption in its json."""
    folder = tmp_path_factory.mktemp("data")
    for name, sizes in {"a": [6, 4], "b": [9, 12, 8]}.items():
        (folder / name).mkdir()
        for shard, num in enumerate(sizes):
            keys = [f"{name}_{shard}_{i}" for i in range(num)]
            members = [row for key in keys for row in (*make_pair(key), (f"{key}.json", make_json(alt=f"other {key}")))]
            write_shard(folder / name / f"{shard:05d}.tar", members)
    return folder


def _mixed(folder: Path, *, weights: tuple[float, float] = (3.0, 1.0), **changes: Any) -> DataConfig:
    sources = [
        {"shards": [str(folder / "a")], "weight": weights[0], "name": "first"},
        {"shards": [str(folder / "b")], "weight": weights[1], "captions": {"sources": {"json.alt": 1.0}}},
    ]
    return make_config(folder, **{"shards": [], "sources": sources, "shards_per_group": 2, **changes})


def _train(config: Any, clip: Tokenizer, num: int, **changes: Any) -> list[dict[str, Any]]:
    settings = {"seed": 3, "rank": 0, "world_size": 1, **changes}
    return list(islice(build_train_loader(config, clip, **settings), num))


def _keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def test_the_shares_follow_the_weights_and_are_told(folder: Path, clip: Tokenizer) -> None:
    batches = _train(_mixed(folder), clip, 100)
    drops = DropCounter()
    for batch in batches:
        drops.add(batch["position"])
    num_first = sum(key.startswith("a") for key in _keys(batches))
    assert drops.source_shares() == {"source/first": num_first / 400, "source/1": 1 - num_first / 400}
    assert 0.68 < num_first / 400 < 0.82


def test_each_source_has_epochs_of_its_own_in_which_every_sample_comes_once(folder: Path, clip: Tokenizer) -> None:
    keys = _keys(_train(_mixed(folder), clip, 60))
    for name, num in (("a", 10), ("b", 29)):
        own = [key for key in keys if key.startswith(name)]
        assert max(Counter(own[:num]).values()) == 1
        assert max(Counter(own).values()) - min(Counter(own).values()) <= 1


def test_captions_are_chosen_by_source(folder: Path, clip: Tokenizer) -> None:
    for batch in _train(_mixed(folder), clip, 10):
        for key, token_L in zip(batch["key"], batch["token"]):
            first_word = clip.decode(token_L.tolist()).split()[0]
            assert first_word == ("photo" if key.startswith("a") else "other")


def test_the_mix_is_a_function_of_seed_worker_and_place(folder: Path, clip: Tokenizer) -> None:
    whole, again = (_keys(_train(_mixed(folder), clip, 12)) for _ in range(2))
    assert whole == again
    numbers = [draw_source([3.0, 1.0], seed="3/0", place=place) for place in range(48)]
    assert [int(key.startswith("b")) for key in whole] == numbers
    assert numbers != [draw_source([3.0, 1.0], seed="3/1", place=place) for place in range(48)]
    assert _keys(_train(_mixed(folder), clip, 12, seed=4)) != whole


@pytest.mark.parametrize(("num_workers", "stops"), [(0, (1, 5, 11)), (2, (3, 8))])
def test_a_mixed_stream_resumes_exactly(folder: Path, clip: Tokenizer, num_workers: int, stops: tuple[int, ...]) -> None:
    config = _mixed(folder, num_workers=num_workers)
    whole = _train(config, clip, 16)
    for stop in stops:
        tracker = PositionTracker()
        for batch in whole[:stop]:
            tracker.update(batch["position"])
        resumed = _train(config, clip, 16 - stop, resume=json.loads(json.dumps(tracker.state())))
        for batch, expected in zip(resumed, whole[stop:], strict=True):
            assert batch["key"] == expected["key"]
            assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["token"], expected["token"])
            assert {**batch["position"], "worst": None} == {**expected["position"], "worst": None}
    with pytest.raises(CheckpointError, match="another order"):
        _train(_mixed(folder, num_workers=num_workers, weights=(1, 1)), clip, 1, resume=tracker.state())


def test_a_mixed_stream_goes_on_with_another_number_of_processes(folder: Path, clip: Tokenizer, tmp_path: Path) -> None:
    """Each source's first epoch comes once in all, over two ranks and then one."""
    seen: Counter[str] = Counter()
    for rank in range(2):
        tracker = PositionTracker()
        for batch in _train(_mixed(folder, weights=(1, 1), batch_size=1), clip, 3 + 2 * rank, rank=rank, world_size=2):
            tracker.update(batch["position"])
            seen.update(batch["key"])
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps(tracker.state()))
    start = load_positions(tmp_path, 0, was_world_size=2, world_size=1)
    assert start is not None and start["collected"]["place"] == 5
    for batch in _train(_mixed(folder, weights=(1, 1), batch_size=2), clip, 40, resume=start):
        stands = batch["position"]["sources"]
        if not any(stand and stand["epoch"] > 0 for stand in stands):
            seen.update(batch["key"])
    num_first = sum(key.startswith("a") for key in seen)
    assert max(seen.values()) == 1
    assert num_first >= 9  # a batch that reaches the second epoch is not counted


def test_evaluation_inside_a_run_reads_its_own_shards(folder: Path) -> None:
    held = held_out(EvaluateConfig(shards=[str(folder / "a")]), _mixed(folder))
    (batch,) = build_eval_loader(held, rank=0, world_size=1, batch_size=50)
    assert len(batch["key"]) == 10


def test_evaluation_reads_all_sources_one_after_the_other(folder: Path, clip: Tokenizer) -> None:
    (batch,) = build_eval_loader(_mixed(folder), rank=0, world_size=1, batch_size=50)
    assert [key[0] for key in batch["key"]] == ["a"] * 10 + ["b"] * 29
    assert batch["captions"][0] == ["photo a_0_0"] and batch["captions"][-1] == ["other b_2_7"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"shards": ["x"], "sources": [{"shards": ["y"]}]}, "either `shards` or `sources`"),
        ({}, "found neither"),
        ({"sources": [{"shards": ["y"], "weight": 0}]}, r"sources.0.weight"),
        ({"sources": [{"shards": ["y"], "wieght": 1}]}, "did you mean 'weight'"),
    ],
)
def test_a_wrong_choice_of_data_says_what_is_expected(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(DataConfig, {"batch_size": 3, **tree}, source="test")
