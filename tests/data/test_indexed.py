"""Loaders over numbered records: one order for one seed, every record once an epoch, and a resume that reads nothing again."""

import json
from collections import Counter
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from shard_maker import encode_image

from sycoca.data.elastic import load_positions
from sycoca.data.indexed import IndexedConfig, build_indexed_eval_loader, build_indexed_train_loader
from sycoca.data.order import deal_runs, mix_in_groups
from sycoca.data.position import DropCounter, PositionTracker
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.types import CheckpointError, DataError

NUM = 23
encode = lru_cache(encode_image)


class MadeRecords:
    """Noise images, one for `per_image` records, with the record's number as text and class; those in `bad` are broken.

    Counts what is read.
    """

    def __init__(
        self, num: int = NUM, *, bad: tuple[int, ...] = (), num_answers: int = 0, is_drawing: bool = False,
        per_image: int = 1, group_size: int = 1,
    ):  # fmt: skip
        self.num = num
        self.group_size = group_size
        self.image_N = np.arange(num) // per_image
        self.bad = bad
        self.num_answers = num_answers
        self.is_drawing = is_drawing
        self.num_read = 0

    def __len__(self) -> int:
        return self.num

    def key(self, index: int) -> str:
        return f"k{index}"

    def image_name(self, index: int) -> str:
        return f"folder/{self.image_N[index]}.jpg"

    def image(self, index: int) -> bytes:
        self.num_read += 1
        number = int(self.image_N[index])
        return b"" if number in self.bad else encode(number)

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
        for batch, expected in zip(_train(MadeRecords(), config, clip, 2, resume=state), whole[start : start + 2], strict=True):
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
    assert set(first[0]) == {"image", "image_row", "token", "length", "key", "target", "num_dropped"}
    assert first[0]["target"].shape == (4, 4)


def _seen_images(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The pixels that each sample is about, by its key."""
    rows = ((batch["key"], batch["image"][batch["image_row"]]) for batch in batches)
    return {key: image_CHW for keys, image_BCHW in rows for key, image_CHW in zip(keys, image_BCHW, strict=True)}


def test_what_is_asked_about_one_image_shares_its_row_and_its_crop(clip: Tokenizer):
    records = MadeRecords(24, per_image=4, group_size=4)
    batches = _train(records, _config(batch_size=8), clip, 3)
    assert [len(batch["image"]) for batch in batches] == [2, 2, 2]
    assert records.num_read == 6
    images = _seen_images(batches)
    assert sorted(images) == sorted(f"k{index}" for index in range(24))
    for index in range(24):
        assert torch.equal(images[f"k{index}"], images[f"k{index // 4 * 4}"])
    assert not torch.equal(images["k0"], images["k4"])
    again = _seen_images(_train(records, _config(batch_size=8), clip, 6)[3:])
    assert not torch.equal(images["k0"], again["k0"])  # another epoch, another crop


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (1, 2), (2, 2)])
def test_images_are_shared_on_every_rank_and_in_every_worker(clip: Tokenizer, world_size: int, num_workers: int):
    records, config = MadeRecords(64, per_image=4, group_size=4), _config(batch_size=8, num_workers=num_workers)
    for rank in range(world_size):
        for batch in _train(records, config, clip, 16 // world_size, rank=rank, world_size=world_size):
            assert len(batch["image"]) <= 3  # two images' questions, of which a stream's ends may split one


def test_no_more_than_the_group_stand_together(clip: Tokenizer):
    batches = _train(MadeRecords(24, per_image=4, group_size=3), _config(batch_size=6), clip, 4)
    runs = [[len(list(run)) for _, run in groupby(int(key[1:]) // 4 for key in batch["key"])] for batch in batches]
    assert max(map(max, runs)) <= 4  # two groups of one image may meet
    assert sum(map(len, runs)) >= 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_of_groups_is_bit_identical(clip: Tokenizer, num_workers: int):
    config = _config(num_workers=num_workers)
    records = MadeRecords(46, per_image=5, group_size=4, bad=(3,))
    whole = _train(records, config, clip, 24)
    for stop in (1, 5, 17):
        tracker = PositionTracker()
        for batch in whole[:stop]:
            tracker.update(batch["position"])
        rest = _train(records, config, clip, 24 - stop, resume=json.loads(json.dumps(tracker.state())))
        for batch, expected in zip(rest, whole[stop:], strict=True):
            _assert_equal(batch, expected)


def test_groups_are_dealt_anew_to_another_number_of_processes(clip: Tokenizer, tmp_path: Path):
    records, seen = MadeRecords(46, per_image=5, group_size=5), Counter[str]()
    for rank in range(2):
        tracker = PositionTracker()
        for batch in _train(records, _config(batch_size=3), clip, 3, rank=rank, world_size=2):
            tracker.update(batch["position"])
            seen.update(batch["key"])
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps(tracker.state()))
    for rank in range(3):
        start = load_positions(tmp_path, rank, was_world_size=2, world_size=3)
        for batch in _train(records, _config(batch_size=2), clip, 20, rank=rank, world_size=3, resume=start):
            if batch["position"]["epoch"] > 0:
                break
            seen.update(batch["key"])
    # the last batch of a stream's epoch may reach into the next one: what is left of the epoch is at most that batch
    assert set(seen.values()) == {1}
    assert 46 - 3 * 2 < len(seen) <= 46


def test_another_size_of_groups_is_another_order(clip: Tokenizer):
    tracker = PositionTracker()
    tracker.update(_train(MadeRecords(per_image=4, group_size=4), _config(), clip, 1)[0]["position"])
    with pytest.raises(CheckpointError, match="another order of samples"):
        _train(MadeRecords(per_image=4, group_size=2), _config(), clip, 1, resume=tracker.state())


def test_each_question_on_a_bad_image_is_counted(clip: Tokenizer):
    drops = DropCounter()
    for batch in _train(MadeRecords(24, per_image=3, group_size=3, bad=(5,)), _config(), clip, 14):
        drops.add(batch["position"])
    assert drops.counts["empty_image"] in (3, 6)  # two epochs; the next batch tells what was dropped after the last


def test_evaluation_reads_an_image_once_for_all_that_follows(clip: Tokenizer):
    alone, shared = MadeRecords(24), MadeRecords(24, per_image=4)
    batches = _evaluate(shared, _config(), clip, batch_size=6)
    assert shared.num_read == 6
    assert [len(batch["image"]) for batch in batches] == [2, 2, 2, 2]
    expected = _seen_images(_evaluate(alone, _config(), clip))
    for key, image_CHW in _seen_images(batches).items():
        assert torch.equal(image_CHW, expected[f"k{int(key[1:]) // 4}"])


@pytest.mark.parametrize("group_size", [1, 2, 3, 50])
def test_groups_of_an_owner_are_whole_and_their_order_is_drawn(group_size: int):
    owner_N = np.random.default_rng(0).integers(0, 9, 40)
    order_N, again_N, other_N = (mix_in_groups(owner_N, group_size, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (order_N == again_N).all() and (order_N != other_N).any()
    assert sorted(order_N.tolist()) == list(range(40))
    num_runs = 1 + np.count_nonzero(np.diff(owner_N[order_N]))
    num_groups = sum(-(-int(num) // group_size) for num in np.bincount(owner_N))
    assert num_runs <= num_groups
    if group_size == 1:
        assert (order_N == np.random.default_rng(1).permutation(40)).all()
    if group_size == 50:
        assert num_runs == num_groups


@pytest.mark.parametrize(("num", "num_streams"), [(12, 3), (13, 4), (3, 5), (7, 1)])
def test_each_stream_reads_a_run_of_neighbours(num: int, num_streams: int):
    dealt_N = deal_runs(np.arange(num), num_streams)
    assert sorted(dealt_N.tolist()) == list(range(num))
    assert all((np.diff(dealt_N[stream::num_streams]) == 1).all() for stream in range(num_streams))
