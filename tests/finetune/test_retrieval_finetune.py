"""Fine-tuning to compare images with texts, end to end on tiny scenes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_data import NUM_VAL, TEMPERATURE, experiment, forget_after, held_out, quiet_run, save_start, scenes
from safetensors.torch import load_file

import sycoca
from sycoca.config import parse_config
from sycoca.evaluation.rerank import RerankEvaluator
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.finetune.retrieval import LOG_LOGIT_SCALE, FinetuneRetrievalConfig, build_task, finetune_retrieval
from sycoca.finetune.start import start_from
from sycoca.models.sycoca import Part
from sycoca.types import CheckpointError, ConfigError

__all__ = ["quiet_run", "scenes"]
pytestmark = pytest.mark.usefixtures("quiet_run")


@pytest.fixture(scope="module")
def start(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "run", scenes)


def finetune(tree: dict[str, Any]) -> dict[str, Any]:
    return finetune_retrieval(parse_config(FinetuneRetrievalConfig, tree, source="tests"))


def temperature_of(tree: dict[str, Any]) -> float:
    config = parse_config(FinetuneRetrievalConfig, tree, source="tests")
    task = build_task(config, start_from(config.start, parts=config.parts))
    return math.exp(-float(task.get_parameter(LOG_LOGIT_SCALE).detach()))


def test_a_checkpoint_becomes_a_checkpoint_that_is_measured_as_the_run_said(start: Path, scenes: Path, tmp_path: Path):
    found = finetune(experiment(start, scenes, tmp_path))
    subject = sycoca.load(found["checkpoint"])
    scores = RetrievalEvaluator(held_out(scenes))(subject)
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    assert found["num_images"] == NUM_VAL
    assert subject.config.parts == ["contrast", "text"]
    best = json.loads((tmp_path / "checkpoints" / "best" / "meta.json").read_text())
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert best["metrics"]["mean_recall"] == max(line.get("eval/mean_recall", 0) for line in logged)


def test_with_captioning_beside_it_the_checkpoint_can_re_rank(start: Path, scenes: Path, tmp_path: Path):
    found = finetune(experiment(start, scenes, tmp_path, caption_weight=0.5, optim={"num_steps": 1}))
    subject = sycoca.load(found["checkpoint"])
    scores = RerankEvaluator(lambda: held_out(scenes), num_candidates=3, weight=0.1)(subject)
    assert {name: found[name] for name in found if "R@" in name} == pytest.approx(
        {name: value for name, value in scores.items() if "R@" in name and "reranked" not in name}
    )
    assert scores["reranked/num_captions"] == scores["num_captions"]
    evaluator = RerankEvaluator(lambda: held_out(scenes), num_candidates=3, weight=0.1)
    plain = sycoca.load(finetune(experiment(start, scenes, tmp_path / "plain", optim={"num_steps": 1}))["checkpoint"])
    with pytest.raises(CheckpointError, match="cannot rate captions"):
        evaluator(plain)


def test_the_temperature_goes_on_from_the_checkpoint_s_unless_it_is_set(start: Path, scenes: Path, tmp_path: Path):
    assert temperature_of(experiment(start, scenes, tmp_path)) == pytest.approx(TEMPERATURE)
    assert temperature_of(experiment(start, scenes, tmp_path, temperature=0.05)) == pytest.approx(0.05)
    assert temperature_of(experiment(start, scenes, tmp_path, start={"weights": "random"})) == pytest.approx(0.07)


def test_pairs_of_one_image_are_no_negatives(start: Path, scenes: Path, tmp_path: Path):
    losses = []
    for is_masked in (True, False):
        config = parse_config(
            FinetuneRetrievalConfig, experiment(start, scenes, tmp_path, mask_duplicates=is_masked), source="tests"
        )
        begun = start_from(config.start, parts=config.parts)
        task = build_task(config, begun)
        token, length = begun.tokenizer.tokenize(["a red circle", "a blue circle", "a circle"], 12)
        batch: Any = {"image": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "token": token,
                      "length": length, "key": ["one#0", "one#1", "two"], "position": {}}  # fmt: skip
        losses.append(float(task(batch)[0].detach()))
    assert losses[0] < losses[1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(start: Path, scenes: Path, tmp_path: Path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        finetune(experiment(start, scenes, folder, optim={"layer_decay": 0.7}))
    forget_after(resumed, step=2)
    finetune(experiment(start, scenes, resumed, optim={"layer_decay": 0.7}))
    weights, others = (load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (whole, resumed))
    assert all(others[name].equal(value) for name, value in weights.items())


def test_a_start_without_contrast_is_one_clear_error(scenes: Path, tmp_path: Path):
    parts: tuple[Part, ...] = ("text", "text_decoder")
    start = save_start(tmp_path / "start", scenes, parts=parts)
    with pytest.raises(CheckpointError, match="without the part 'contrast' and cannot compare images with texts"):
        finetune(experiment(start, scenes, tmp_path / "run"))


def test_samples_are_refused(start: Path, scenes: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.sample_every"):
        finetune(experiment(start, scenes, tmp_path, run={"sample_every": 1}))
