"""Loaders over numbered records: one order for one seed, every record once an epoch, and a resume that reads nothing again."""

import json
from collections import Counter
from functools import lru_cache
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from shard_maker import encode_image

from sycoca.data.indexed import IndexedConfig, build_indexed_eval_loader, build_indexed_train_loader
from sycoca.data.position import DropCounter, PositionTracker
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.types import CheckpointError, DataError

NUM = 23
encode = lru_cache(encode_image)


class MadeRecords:
    """Noise images with their number as text and class; those in `bad` are broken. Counts what is read."""

    def __init__(self, num: int = NUM, *, bad: tuple[int, ...] = (), num_answers: int = 0, is_drawing: bool = False):
        self.num = num
        self.bad = bad
        self.num_answers = num_answers
        self.is_drawing = is_drawing
        self.num_read = 0

    def __len__(self) -> int:
        return self.num

    def key(self, index: int) -> str:
        return f"k{index}"

    def image_name(self, index: int) -> str:
        return f"folder/{index}.jpg"

    def image(self, index: int) -> bytes:
        self.num_read += 1
        return b"" if index in self.bad else encode(index)

    def text(self, index: int, generator: Random) -> str:
        return f"photo {generator.randrange(1000) if self.is_drawing else index}"

    def target(self, index: int) -> Any:
        if not self.num_answers:
            return index
        target_N = np.zeros(self.num_answers, dtype=np.float32)
        target_N[index % self.num_answers] = 0.3
        return target_N


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


def _config(**changes: Any) -> IndexedConfig:
    return IndexedConfig.model_validate({"batch_size": 3, "num_workers": 0, "transform": {"size": 8}, **changes})


def _train(records: MadeRecords, config: IndexedConfig, clip: Tokenizer, num: int, **changes: Any) -> list[dict[str, Any]]:
    settings = {"tokenizer": clip, "seed": 3, "rank": 0, "world_size": 1, **changes}
    return list(islice(build_indexed_train_loader(records, config, **settings), num))


def _evaluate(records: MadeRecords, config: IndexedConfig, clip: Tokenizer, **changes: Any) -> list[dict[str, Any]]:
    settings = {"tokenizer": clip, "rank": 0, "world_size": 1, "batch_size": 4, **changes}
    return list(build_indexed_eval_loader(records, config, **settings))


def _keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def _assert_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("image", "token", "length", "target"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["key"] == expected["key"]
    assert {**batch["position"], "worst": None} == {**expected["position"], "worst": None}


def test_a_batch_keeps_its_contract(clip: Tokenizer):
    (batch,) = _train(MadeRecords(), _config(), clip, 1)
    assert batch["image"].shape == (3, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["token"].shape == (3, 8)
    assert batch["target"].dtype == batch["token"].dtype == batch["length"].dtype == torch.int64
    assert batch["target"].tolist() == [int(key[1:]) for key in batch["key"]]
    for key, token_L, length in zip(batch["key"], batch["token"], batch["length"]):
        assert clip.decode(token_L.tolist()).replace(" ", "") == f"photo{key[1:]}"
        assert token_L[length - 1] == clip.eos
        assert (token_L[length:] == clip.pad).all()


def test_soft_targets_are_a_dense_matrix(clip: Tokenizer):
    (batch,) = _train(MadeRecords(num_answers=7), _config(), clip, 1)
    assert batch["target"].dtype == torch.float32
    assert batch["target"].shape == (3, 7)
    assert batch["target"].argmax(1).tolist() == [int(key[1:]) % 7 for key in batch["key"]]
    assert batch["target"].sum().item() == pytest.approx(0.9)


def test_one_seed_gives_one_order_and_another_seed_another(clip: Tokenizer):
    first, again = (_train(MadeRecords(is_drawing=True), _config(), clip, 12) for _ in range(2))
    for batch, expected in zip(again, first, strict=True):
        _assert_equal(batch, expected)
    assert _keys(_train(MadeRecords(), _config(), clip, 12, seed=4)) != _keys(first)


def test_epochs_differ_in_order_and_crops(clip: Tokenizer):
    batches = _train(MadeRecords(), _config(batch_size=1), clip, 2 * NUM)
    first, second = _keys(batches[:NUM]), _keys(batches[NUM:])
    assert sorted(first) == sorted(second)
    assert first != second
    again = NUM + second.index(first[0])
    assert not torch.equal(batches[0]["image"], batches[again]["image"])


def test_a_loading_process_gives_the_order_of_the_training_process(clip: Tokenizer):
    inside, outside = (_train(MadeRecords(), _config(num_workers=number), clip, 12) for number in (0, 1))
    for batch, expected in zip(outside, inside, strict=True):
        _assert_equal(batch, expected)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (1, 3), (2, 2)])
def test_each_record_comes_once_an_epoch_over_ranks_and_workers(clip: Tokenizer, world_size: int, num_workers: int):
    config = _config(batch_size=1, num_workers=num_workers)
    seen: Counter[str] = Counter()
    for rank in range(world_size):
        for batch in _train(MadeRecords(), config, clip, NUM + 4, rank=rank, world_size=world_size):
            seen.update(batch["key"] if batch["position"]["epoch"] == 0 else [])
    assert seen == {f"k{index}": 1 for index in range(NUM)}


def test_every_rank_gives_full_batches_without_end(clip: Tokenizer):
    records = MadeRecords(5)
    parts = [_train(records, _config(batch_size=4), clip, 6, rank=rank, world_size=3) for rank in range(3)]
    assert [[len(batch["key"]) for batch in part] for part in parts] == [[4] * 6] * 3


@pytest.mark.parametrize(("num_workers", "stops"), [(0, (1, 4, 7, 8, 15)), (1, (5,)), (3, (1, 2, 7, 12))])
def test_a_resumed_stream_is_bit_identical(clip: Tokenizer, num_workers: int, stops: tuple[int, ...]):
    config = _config(num_workers=num_workers, transform={"size": 8, "rand_augment": "rand-m9-mstd0.5-inc1"})
    records = MadeRecords(bad=(2, 11), is_drawing=True)
    whole = _train(records, config, clip, 20)
    for stop in stops:
        tracker = PositionTracker()
        for batch in whole[:stop]:
            tracker.update(batch["position"])
        resume = json.loads(json.dumps(tracker.state()))
        for batch, expected in zip(_train(records, config, clip, 20 - stop, resume=resume), whole[stop:], strict=True):
            _assert_equal(batch, expected)


def test_a_stream_resumed_twice_is_still_the_same(clip: Tokenizer):
    config = _config(num_workers=2)
    whole = _train(MadeRecords(), config, clip, 12)
    state = None
    for start in (0, 5, 10):
        tracker = PositionTracker(state)
        for batch, expected in zip(_train(MadeRecords(), config, clip, 2, resume=state), whole[start : start + 2]):
            _assert_equal(batch, expected)
        for batch in whole[start : start + 5]:
            tracker.update(batch["position"])
        state = tracker.state()


def test_resuming_reads_only_what_the_next_batches_hold(clip: Tokenizer):
    tracker = PositionTracker()
    for batch in _train(MadeRecords(), _config(), clip, 40):
        tracker.update(batch["position"])
    records = MadeRecords()
    _train(records, _config(), clip, 2, resume=tracker.state())
    assert records.num_read == 6


def test_resuming_into_another_order_is_refused(clip: Tokenizer):
    tracker = PositionTracker()
    tracker.update(_train(MadeRecords(), _config(), clip, 1)[0]["position"])
    for changes in ({"seed": 4}, {"rank": 1, "world_size": 2}):
        with pytest.raises(CheckpointError, match=r"same seed.*workers, and the same records"):
            _train(MadeRecords(), _config(), clip, 1, resume=tracker.state(), **changes)
    for records, config in ((MadeRecords(NUM + 1), _config()), (MadeRecords(), _config(num_workers=2))):
        with pytest.raises(CheckpointError):
            _train(records, config, clip, 1, resume=tracker.state())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_counted_and_named(clip: Tokenizer, num_workers: int):
    drops = DropCounter()
    batches = _train(MadeRecords(bad=(5,)), _config(batch_size=2, num_workers=num_workers), clip, 11)
    for batch in batches:
        drops.add(batch["position"])
    assert drops.counts == {"empty_image": 1}
    assert "folder/5.jpg" in drops.line()
    assert "k5" not in _keys(batches)


def test_too_many_bad_images_stop_the_run(clip: Tokenizer):
    with pytest.raises(DataError, match=r"could not be used.*worst file: folder/\d+\.jpg \(\d+ empty_image\)"):
        _train(MadeRecords(200, bad=tuple(range(100))), _config(), clip, 60)
    with pytest.raises(DataError, match="no usable image in 3 epochs"):
        _train(MadeRecords(4, bad=(0, 1, 2, 3)), _config(), clip, 1)


def test_fewer_records_than_workers_is_an_error_not_a_hang(clip: Tokenizer):
    with pytest.raises(DataError, match="3 records are too few for 4 loader workers"):
        _train(MadeRecords(3), _config(num_workers=2), clip, 1, world_size=2)


def test_a_long_text_is_cut_and_counted_and_an_empty_one_kept(clip: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    texts = {0: "", 1: "word " * 30}
    monkeypatch.setattr(MadeRecords, "text", lambda self, index, generator: texts.get(index, "one"))
    batches = _train(MadeRecords(3), _config(max_tokens=9), clip, 1)
    rows = dict(zip(batches[0]["key"], zip(batches[0]["token"], batches[0]["length"].tolist())))
    assert rows["k0"][1] == 2
    assert rows["k1"][1] == 9
    assert rows["k1"][0][8] == clip.eos
    assert batches[0]["position"]["num_dropped"] == {"truncated_caption": 1}


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (3, 0), (2, 2), (30, 0)])
def test_evaluation_sees_each_record_once(clip: Tokenizer, world_size: int, num_workers: int):
    config = _config(num_workers=num_workers)
    ranks = [_evaluate(MadeRecords(), config, clip, rank=rank, world_size=world_size) for rank in range(world_size)]
    every = [f"k{index}" for index in range(NUM)]
    assert [sorted(_keys(batches)) for batches in ranks] == [sorted(every[rank::world_size]) for rank in range(world_size)]
    assert all(batch["target"].tolist() == [int(key[1:]) for key in batch["key"]] for part in ranks for batch in part)


def test_evaluation_repeats_itself_and_tells_what_it_dropped(clip: Tokenizer):
    records = MadeRecords(bad=(0, 9, 22), num_answers=4)
    first, again = (_evaluate(records, _config(), clip) for _ in range(2))
    assert all(torch.equal(batch["image"], other["image"]) for batch, other in zip(first, again, strict=True))
    assert [len(batch["key"]) for batch in first] == [4, 4, 4, 4, 4]
    assert sum(batch["num_dropped"].get("empty_image", 0) for batch in first) == 3
    assert set(first[0]) == {"image", "token", "length", "key", "target", "num_dropped"}
    assert first[0]["target"].shape == (4, 4)
