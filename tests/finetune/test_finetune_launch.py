"""Real launches of the fine-tuning tools on two processes: the same run under DDP and ZeRO-3, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs_data import NUM_VAL, experiment, held_out, save_start, scenes

import sycoca
from sycoca.evaluation.captioning import CaptionEvaluator
from tests.smoke.launching import DDP, PLAIN, run, zero_3

__all__ = ["scenes"]
pytestmark = pytest.mark.slow
SELF_CRITICAL = {"stage": "self_critical", "self_critical": {"baseline": "greedy", "num_samples": 2, "max_tokens": 9}}


def launch(launcher: list[str], tool: str, tree: dict[str, Any]) -> dict[str, Any]:
    """The result that the tool prints."""
    folder = Path(tree["run"]["folder"])
    folder.mkdir(parents=True)
    config = folder / "experiment.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = run([*launcher, f"tools/{tool}.py", str(config)], folder, is_ddp=launcher is DDP)
    if done.returncode != 0:
        pytest.fail(done.stderr[-3000:])
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.fixture(scope="module")
def start(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "run", scenes)


def test_self_critical_training_is_the_same_under_ddp_and_zero_3_and_its_checkpoint_scores_as_it_said(
    start: Path, scenes: Path, tmp_path: Path
):
    found = {
        name: launch(launcher, "finetune_captioning", experiment(start, scenes, tmp_path / name, **SELF_CRITICAL))
        for name, launcher in (("ddp", DDP), ("zero3", zero_3(tmp_path)))
    }
    for figures in found.values():
        scores = CaptionEvaluator(held_out(scenes))(sycoca.load(figures.pop("checkpoint")))
        assert {name: figures[name] for name in scores} == pytest.approx(scores, abs=1e-3)
    assert found["zero3"] == pytest.approx(found["ddp"], abs=1e-3)
    assert found["ddp"]["num_images"] == NUM_VAL


def test_retrieval_on_two_processes_scores_as_the_tool_on_one_and_re_ranks(start: Path, scenes: Path, tmp_path: Path):
    found = launch(DDP, "finetune_retrieval", experiment(start, scenes, tmp_path / "run", caption_weight=0.5))
    command = ["tools/evaluate_retrieval.py", found["checkpoint"], "--shards", f"{scenes}/val-*.tar", "--rerank", "3"]
    alone = json.loads(run([*PLAIN, *command], scenes).stdout.splitlines()[-1])
    assert {name: alone[name] for name in found if "R@" in name} == {name: found[name] for name in found if "R@" in name}
    assert alone["reranked/num_images"] == NUM_VAL
    assert sycoca.load(tmp_path / "run").config.parts == ["contrast", "text", "text_decoder"]
