"""Training from a faulty server: the batches of the local disk where faults are healed, named losses where they are not."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import FaultyServer, serve
from shard_maker import make_config, write_shard, write_shards

from sycoca.data.pipeline import build_eval_loader, build_train_loader
from sycoca.data.position import DropCounter
from sycoca.data.tokenizer import Tokenizer, build_tokenizer
from sycoca.types import DataError

SIZES = [5, 9, 7, 11, 6]
PATIENT = {"num_attempts": 60, "stall_seconds": 0.3, "backoff_seconds": 0.001, "max_backoff_seconds": 0.01}
HASTY = {**PATIENT, "num_attempts": 2, "stall_seconds": 0.2}


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return build_tokenizer("clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", SIZES)


def _train(config: Any, clip: Tokenizer, num: int, **changes: Any) -> list[dict[str, Any]]:
    settings = {"seed": 3, "rank": 0, "world_size": 1, **changes}
    return list(islice(build_train_loader(config, clip, **settings), num))


@pytest.mark.parametrize(("num_workers", "has_cache"), [(0, False), (0, True), (2, True)])
def test_a_server_whose_faults_are_healed_gives_the_batches_of_the_local_disk(
    folder: Path, clip: Tokenizer, tmp_path: Path, num_workers: int, has_cache: bool
) -> None:
    expected = _train(make_config(folder, num_workers=num_workers), clip, 20)
    server = FaultyServer(folder, seed=1, fault_share=0.6)
    cache = {"folder": str(tmp_path / "cache"), "max_gb": 1} if has_cache else None
    with serve(server) as url:
        config = make_config(folder, num_workers=num_workers, remote=PATIENT, cache=cache)
        config = config.model_copy(update={"shards": [f"{url}/{{00000..00004}}.tar"]})
        found = _train(config, clip, 20)
    assert sum(server.seen[fault] for fault in server.faults) > 0
    for batch, same in zip(found, expected, strict=True):
        assert batch["key"] == same["key"]
        assert torch.equal(batch["image"], same["image"]) and torch.equal(batch["token"], same["token"])
        assert batch["position"]["num_dropped"] == {}


def test_evaluation_reads_from_a_faulty_server(folder: Path) -> None:
    with serve(FaultyServer(folder, seed=6, fault_share=0.3)) as url:
        config = make_config(folder, remote=PATIENT).model_copy(update={"shards": [f"{url}/{{00000..00004}}.tar"]})
        keys = [key for batch in build_eval_loader(config, rank=0, world_size=1, batch_size=9) for key in batch["key"]]
    assert keys == [f"{shard}_{i}" for shard, num in enumerate(SIZES) for i in range(num)]


def test_shards_given_up_are_counted_by_reason_and_the_healthy_ones_are_all_seen(folder: Path, clip: Tokenizer) -> None:
    server = FaultyServer(folder)
    server.broken = {"00001.tar": "stall", "00002.tar": "error", "00004.tar": "reset"}
    server.draw_share = lambda: 0.0
    with serve(server) as url:
        config = make_config(folder, batch_size=1, remote=HASTY)
        shards = [f"{url}/{{00000..00004}}.tar", f"{url}/gone.tar"]
        batches = _train(config.model_copy(update={"shards": shards}), clip, 18)
    epoch = [batch for batch in batches if batch["position"]["epoch"] == 0]
    assert sorted(key for batch in epoch for key in batch["key"]) == sorted(
        f"{shard}_{i}" for shard in (0, 3) for i in range(SIZES[shard])
    )
    drops = DropCounter()
    for batch in batches:
        drops.add(batch["position"])
    assert {"remote_stalled", "remote_server_error", "remote_dropped", "remote_refused"} <= set(drops.counts)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_shards_given_up_stop_the_run_with_a_shard_s_name(folder: Path, clip: Tokenizer, num_workers: int) -> None:
    server = FaultyServer(folder)
    server.broken = {"00001.tar": "error", "00002.tar": "error"}
    with serve(server) as url:
        config = make_config(folder, remote=HASTY, num_workers=num_workers, max_bad_share=0.3)
        config = config.model_copy(update={"shards": [f"{url}/{{00000..00004}}.tar"]})
        with pytest.raises(DataError, match=r"shards could not be fetched.*the last was http://.*/0000[12]\.tar"):
            _train(config, clip, 200)


def test_a_server_that_is_gone_ends_in_an_error_not_in_a_hang(folder: Path, clip: Tokenizer) -> None:
    with serve(FaultyServer(folder)) as url:
        pass
    config = make_config(folder, remote=HASTY).model_copy(update={"shards": [f"{url}/{{00000..00004}}.tar"]})
    with pytest.raises(DataError, match=r"no usable sample in \d+ epochs.*remote_dropped"):
        _train(config, clip, 1)


def test_every_rank_makes_as_many_steps_with_empty_shards_and_fewer_shards_than_workers(
    tmp_path: Path, clip: Tokenizer
) -> None:
    config = make_config(write_shards(tmp_path / "s", [0, 3, 0, 12, 0]), batch_size=2)
    for world_size in (1, 2, 4, 7):
        ranks = [_train(config, clip, 12, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [[len(batch["key"]) for batch in batches] for batches in ranks] == [[2] * 12] * world_size


def test_a_worker_that_is_dealt_empty_shards_for_many_epochs_is_not_given_up(tmp_path: Path, clip: Tokenizer) -> None:
    """Two workers, one shard with samples: in one of eight runs of three epochs a worker gets nothing."""
    write_shard(write_shards(tmp_path / "s", [40]) / "00001.tar", [])
    config = make_config(tmp_path / "s", batch_size=1)
    for seed in range(12):
        assert len(_train(config, clip, 3, seed=seed, rank=1, world_size=2)) == 3
