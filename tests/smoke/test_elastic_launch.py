"""A run of two processes that goes on as one: the data goes on as well."""

from itertools import takewhile
from pathlib import Path

import pytest

from sycoca.config import load_config
from sycoca.data.elastic import load_positions
from sycoca.data.pipeline import build_train_loader
from sycoca.data.tokenizer import build_tokenizer
from sycoca.train.pretrain import PretrainConfig
from tests.smoke.launching import DDP, PLAIN, losses, pretrain, run

pytestmark = pytest.mark.slow
QUIET = ("evaluate.every=0", "run.sample_every=0", "optim.num_steps=6")


def _keys_left_in_the_first_epoch(folder: Path) -> list[str]:
    config = load_config(PretrainConfig, folder / "config.yaml")
    data = config.data.model_copy(update={"batch_size": 1})
    resume = load_positions(folder / "checkpoints/last/state", 0, was_world_size=1, world_size=1)
    loader = build_train_loader(
        data, build_tokenizer(data.tokenizer.name), seed=config.run.seed, rank=0, world_size=1, resume=resume
    )
    batches = takewhile(lambda batch: batch["position"]["epoch"] == 0, loader)
    return [key for batch in batches for key in batch["key"]]


def test_two_processes_go_on_as_one_without_repeating_or_losing_a_sample(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DATA", str(data))
    pretrain(DDP, data, tmp_path, *QUIET[:2], "optim.num_steps=3")
    command = [*PLAIN, "tools/pretrain.py", "configs/pretrain/smoke.yaml", f"run.folder={tmp_path}", *QUIET]
    refused = run(command, data)
    assert refused.returncode == 2
    assert "set data.batch_size=8" in refused.stderr.splitlines()[-1]
    done = pretrain(PLAIN, data, tmp_path, *QUIET, "data.batch_size=8")
    assert "at step 3" in done.stderr and "dealt anew" in done.stderr
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]
    left = _keys_left_in_the_first_epoch(tmp_path)
    assert len(set(left)) == len(left) == 60 - 6 * 8
