"""Fine-tuning to write captions, end to end on tiny scenes: from a checkpoint, through a run, to a checkpoint again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_batch, build_model
from pairs_data import MAX_TOKENS, NUM_VAL, SIZE, TRANSFORM, experiment, forget_after, held_out, quiet_run, save_start, scenes
from safetensors.torch import load_file
from torch.nn import functional as F

import sycoca
from sycoca.config import parse_config
from sycoca.evaluation.captioning import CaptionEvaluator
from sycoca.finetune.captioning import FinetuneCaptioningConfig, finetune_captioning, first_images
from sycoca.models.sycoca import Part
from sycoca.objectives.captioning import CaptioningConfig, next_token_labels
from sycoca.types import CheckpointError, ConfigError

__all__ = ["quiet_run", "scenes"]
pytestmark = pytest.mark.usefixtures("quiet_run")
SELF_CRITICAL = {"stage": "self_critical", "self_critical": {"num_samples": 2, "max_tokens": 9}}
STAGES = pytest.mark.parametrize("stage", [{}, SELF_CRITICAL], ids=["cross_entropy", "self_critical"])


@pytest.fixture(scope="module")
def start(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "run", scenes)


def finetune(tree: dict[str, Any]) -> dict[str, Any]:
    return finetune_captioning(parse_config(FinetuneCaptioningConfig, tree, source="tests"))


def lines(folder: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


@STAGES
def test_a_checkpoint_becomes_a_checkpoint_whose_captions_score_as_the_run_said(
    stage: dict[str, Any], start: Path, scenes: Path, tmp_path: Path
):
    found = finetune(experiment(start, scenes, tmp_path, **stage))
    subject = sycoca.load(found["checkpoint"])
    scores = CaptionEvaluator(held_out(scenes))(subject)
    assert found["num_images"] == NUM_VAL
    assert {name: found[name] for name in scores} == pytest.approx(scores, abs=1e-6)
    assert subject.config.parts == ["text", "text_decoder"]
    assert len(lines(tmp_path, "eval/CIDEr")) == 2
    assert (tmp_path / "checkpoints" / "best").resolve().is_dir()
    assert not subject.model.vision.vit.pos_embed.equal(sycoca.load(start).model.vision.vit.pos_embed)


def test_the_caption_loss_falls(start: Path, scenes: Path, tmp_path: Path):
    changes = {"run": {"checkpoint_every": 0}, "optim": {"num_steps": 40, "lr": 0.03}, "evaluate": {"shards": []}}
    finetune(experiment(start, scenes, tmp_path, **changes))
    losses = lines(tmp_path, "ic/loss")
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]


@STAGES
@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(stage: dict[str, Any], start: Path, scenes: Path, tmp_path: Path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        finetune(experiment(start, scenes, folder, evaluate={"shards": []}, **stage))
    forget_after(resumed, step=2)
    finetune(experiment(start, scenes, resumed, evaluate={"shards": []}, **stage))
    weights, others = (load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (whole, resumed))
    assert all(others[name].equal(value) for name, value in weights.items())
    assert [len(lines(folder, "loss")) for folder in (whole, resumed)] == [4, 6]


@pytest.mark.slow
def test_with_an_average_an_interrupted_run_goes_on_to_the_same_weights_and_the_average_is_what_is_saved(
    start: Path, scenes: Path, tmp_path: Path
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    changes = {"evaluate": {"shards": []}, "optim": {"average_decay": 0.5}}
    for folder in (whole, resumed):
        finetune(experiment(start, scenes, folder, **changes))
    forget_after(resumed, step=2)
    finetune(experiment(start, scenes, resumed, **changes))
    last = [folder / "checkpoints" / "last" for folder in (whole, resumed)]
    for name in ("model.safetensors", "state/newest.safetensors"):
        weights, others = (load_file(folder / name) for folder in last)
        assert all(others[key].equal(value) for key, value in weights.items())
    average, newest = load_file(last[0] / "model.safetensors"), load_file(last[0] / "state" / "newest.safetensors")
    assert not average["model.vision.vit.pos_embed"].equal(newest["model.vision.vit.pos_embed"])


def test_random_weights_are_not_the_checkpoint_s(start: Path, scenes: Path, tmp_path: Path):
    losses = []
    for weights in ("checkpoint", "random"):
        tree = experiment(start, scenes, tmp_path / weights, start={"weights": weights}, optim={"num_steps": 1})
        finetune(tree)
        losses += lines(tmp_path / weights, "ic/loss")
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_another_resolution_travels_with_the_checkpoint(start: Path, scenes: Path, tmp_path: Path):
    larger = SIZE + 8
    found = finetune(experiment(start, scenes, tmp_path, start={"image_size": larger}, optim={"num_steps": 1}))
    config = sycoca.load(found["checkpoint"]).config
    assert (config.transform.size, config.model.vision.image_size) == (larger, larger)
    assert (list(config.transform.mean), config.transform.train) == (TRANSFORM["mean"], "resize")


@pytest.mark.slow
def test_samples_of_held_out_images_are_written(start: Path, scenes: Path, tmp_path: Path):
    finetune(experiment(start, scenes, tmp_path, run={"sample_every": 4}, evaluate={"num_samples": 2}, **SELF_CRITICAL))
    assert len(json.loads((tmp_path / "samples" / "step_00000004.json").read_text())) == 2


def test_a_start_without_a_text_decoder_is_one_clear_error(scenes: Path, tmp_path: Path):
    parts: tuple[Part, ...] = ("contrast", "text")
    start = save_start(tmp_path / "start", scenes, parts=parts)
    with pytest.raises(CheckpointError, match="without the part 'text_decoder' and cannot write"):
        finetune(experiment(start, scenes, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"max_tokens": MAX_TOKENS + 1}}, "data.max_tokens is 25 and .* was trained for 24"),
        ({"data": {"tokenizer": {"name": "words"}}}, "data.tokenizer: 'words'; remove it"),
        ({"label_smoothing": 0.1, **SELF_CRITICAL}, "label_smoothing: self-critical training has no labels"),
        ({"optim": {"num_chunks": 3}, **SELF_CRITICAL}, "optim.num_chunks"),
        ({"run": {"sample_every": 1}, "evaluate": {"shards": []}}, "run.sample_every"),
        ({"self_critical": {"num_samples": 1}}, "num_samples to 2 or more"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(
    changes: dict[str, Any], message: str, start: Path, scenes: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        finetune(experiment(start, scenes, tmp_path, **changes))


def test_smoothed_labels_give_pytorch_s_own_smoothed_loss():
    model, batch = build_model({"text", "text_decoder"}), build_batch()
    features = model.encode(batch)
    logit_BLV = model.text_decoder(features.token_BLD, features.patch_BPD)
    label_BL = next_token_labels(batch["token"], batch["length"])
    expected = F.cross_entropy(logit_BLV.mT, label_BL, label_smoothing=0.3)
    loss, metrics = CaptioningConfig(label_smoothing=0.3).build()(model, batch, features)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["loss"], expected)
    plain, _ = CaptioningConfig(label_smoothing=0.0).build()(model, batch, features)
    assert plain != loss


def test_a_limit_counts_images_over_batches(scenes: Path):
    assert [len(batch["key"]) for batch in first_images(held_out(scenes), 4)] == [3, 1]
    assert [batch["image"].shape[0] for batch in first_images(held_out(scenes), 4)] == [3, 1]
    assert list(first_images(held_out(scenes), 0)) == []
