"""Fine-tuning for VQA from end to end: it learns, its checkpoint answers the same, and mistakes are told in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_data import ASKED, COLOURS, TRANSFORM, answer_to, loud_logger, run_settings, save_start, write_questions
from PIL import Image
from safetensors.torch import load_file

import sycoca
from sycoca.config import load_config, parse_config
from sycoca.evaluation.vqa import write_results
from sycoca.finetune.vqa import FinetuneVqaConfig, evaluate_source, finetune_vqa, load_vqa, score_file
from sycoca.types import CheckpointError, ConfigError, DataError

__all__ = ["loud_logger"]
pytestmark = pytest.mark.usefixtures("loud_logger")
CONFIGS = Path(__file__).parents[2] / "configs" / "finetune"
NUM_STEPS = {"classify": 60, "generate": 120}


def make_config(folder: Path, source: dict[str, Any], *, mode: str, num_steps: int, **changes: Any) -> FinetuneVqaConfig:
    tree = {
        **run_settings(folder / "run", num_steps=num_steps, lr=0.01, layer_decay=0.9, head_lr_scale=2.0),
        "start": {"checkpoint": str(folder / "start")},
        "data": {"sources": [source], "batch_size": 9, "max_tokens": 15, "num_workers": 0, "transform": TRANSFORM},
        "mode": mode,
        "answers": {"min_count": 1, "max_tokens": 4},
        "evaluate": {"sources": [source], "every": num_steps, "batch_size": 4},
    }
    for name, change in changes.items():
        tree[name] = {**tree[name], **change}
    return parse_config(FinetuneVqaConfig, tree, source="tests")


def load_picture(source: dict[str, Any], number: int) -> Image.Image:
    return Image.open(Path(source["images"][0]) / f"picture_{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("mode", NUM_STEPS)
def test_a_handful_of_questions_is_learnt_by_heart_and_the_checkpoint_answers_the_same(tmp_path: Path, mode: str):
    save_start(tmp_path / "start")
    source = write_questions(tmp_path)
    config = make_config(tmp_path, source, mode=mode, num_steps=NUM_STEPS[mode])
    figures = finetune_vqa(config)
    assert figures["accuracy"] == 100.0
    assert figures["answer_type/yes/no"] == 100.0
    answerer = load_vqa(tmp_path / "run")
    images = [load_picture(source, number) for number in range(3) for _ in ASKED]
    expected = [answer_to(question, colour) for colour in COLOURS for question in ASKED]
    assert answerer.answer(images, ASKED * 3) == expected
    assert [answerer.answer([image], [question])[0] for image, question in zip(images, ASKED * 3)] == expected
    assert answerer.answer([], []) == []
    answers, again = evaluate_source(answerer, config.evaluate.sources[0], batch_size=2)
    assert {name: figures[name] for name in again} == again
    write_results(tmp_path / "results.json", answers)
    scored = score_file(tmp_path / "results.json", annotations=tmp_path / "annotations.json", questions=source["questions"])
    assert scored == again
    settings = json.loads((tmp_path / "run" / "checkpoints" / "best" / "answers.json").read_text(encoding="utf-8"))
    assert settings["mode"] == mode
    assert set(settings["answers"]) == set(expected)
    assert sycoca.load(tmp_path / "run").caption(images[:1])  # what it learnt in pretraining is still there to be used


@pytest.mark.parametrize("questions_per_image", [1, 3])
def test_training_goes_on_after_an_interruption_as_if_there_had_been_none(tmp_path: Path, questions_per_image: int):
    save_start(tmp_path / "start")
    source = write_questions(tmp_path)
    data = {"batch_size": 4, "questions_per_image": questions_per_image}
    for name, num_steps in (("whole", 4), ("part", 2), ("part", 4)):
        optim = {"num_steps": num_steps, "final_lr_share": 1.0}
        finetune_vqa(make_config(
            tmp_path, source, mode="generate", num_steps=4, optim=optim, start={"drop_path": 0.3},
            run={"folder": str(tmp_path / name), "checkpoint_every": 2}, data=data,
        ))  # fmt: skip
    weights = [load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("whole", "part")]
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name


def test_answers_outside_the_vocabulary_are_counted_and_wrong(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_start(tmp_path / "start")
    source = write_questions(tmp_path)
    (tmp_path / "answers.txt").write_text("zebra\nno\n", encoding="utf-8")
    answers = {"file": str(tmp_path / "answers.txt")}
    figures = finetune_vqa(make_config(tmp_path, source, mode="classify", num_steps=1, answers=answers))
    assert "6 questions (66.7 %) have no answer among them" in capsys.readouterr().err
    assert float(figures["accuracy"]) <= 100 * 3 / 9  # "no" is right three times
    assert figures["answer_type/other"] == 0.0


def test_a_checkpoint_that_cannot_write_is_refused(tmp_path: Path):
    save_start(tmp_path / "start", parts=("contrast", "text"))
    config = make_config(tmp_path, write_questions(tmp_path), mode="classify", num_steps=1)
    with pytest.raises(CheckpointError, match="without the part 'text_decoder' and cannot write or answer"):
        finetune_vqa(config)


def test_a_checkpoint_that_was_not_fine_tuned_cannot_answer(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no answers\.json: not a checkpoint of tools/finetune_vqa\.py"):
        load_vqa(save_start(tmp_path / "start"))


def test_a_checkpoint_whose_head_has_another_number_of_answers_is_refused(tmp_path: Path):
    save_start(tmp_path / "start")
    finetune_vqa(make_config(tmp_path, write_questions(tmp_path), mode="classify", num_steps=1))
    path = tmp_path / "run" / "checkpoints" / "best" / "answers.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "answers": settings["answers"][1:]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has shape"):
        load_vqa(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"questions": 3}', "a list 'questions'"), ('{"questions": [{"question": "?"}]}', "image_id")],
)
def test_questions_that_are_not_vqa_v2_s_json_are_told_in_one_line(tmp_path: Path, text: str, message: str):
    save_start(tmp_path / "start")
    source = write_questions(tmp_path)
    (tmp_path / "questions.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        finetune_vqa(make_config(tmp_path, source, mode="classify", num_steps=1))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path: Path):
    save_start(tmp_path / "start")
    source = write_questions(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.max_tokens.*17 tokens and answers of 4"):
        finetune_vqa(make_config(tmp_path, source, mode="generate", num_steps=1, data={"max_tokens": 17}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        finetune_vqa(make_config(tmp_path, source, mode="classify", num_steps=1, data={"tokenizer": {"name": "other"}}))
    with pytest.raises(ConfigError, match=r"optim\.num_chunks.*lower data\.batch_size"):
        finetune_vqa(make_config(tmp_path, source, mode="classify", num_steps=1, optim={"num_chunks": 3}))
    for field in ("data", "evaluate"):
        unanswered = {field: {"sources": [{**source, "annotations": None}]}}
        with pytest.raises(ConfigError, match=rf"{field}\.sources: question 100 has no answers"):
            finetune_vqa(make_config(tmp_path, source, mode="classify", num_steps=1, **unanswered))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vqa_*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_are_whole(path: Path):
    config = load_config(FinetuneVqaConfig, path)
    assert Path(config.run.folder).name == path.stem
    assert config.evaluate.sources != config.data.sources
    assert f"tools/finetune_vqa.py configs/finetune/{path.name}" in path.read_text(encoding="utf-8").replace("\\\n#   ", "")


def test_the_size_of_the_images_may_change(tmp_path: Path):
    save_start(tmp_path / "start")
    source = write_questions(tmp_path)
    finetune_vqa(make_config(tmp_path, source, mode="classify", num_steps=1, start={"image_size": 20}))
    answerer = load_vqa(tmp_path / "run")
    assert answerer.subject.config.transform.size == 20
    assert answerer.subject.config.transform.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        assert answerer.answer([load_picture(source, 0)], ASKED[:1])
