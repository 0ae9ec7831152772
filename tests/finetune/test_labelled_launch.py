"""The tools with one process and with several give the same figures, on sets that do not divide by their number."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from labelled_data import TRANSFORM, loud_logger, run_settings, save_start, write_images, write_questions

from tests.smoke.launching import DDP, ROOT, run, zero_3

__all__ = ["loud_logger"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loud_logger")]


def run_here(tool: str, *arguments: str) -> None:
    """A tool in this process: starting another takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"tools/{tool}.py", *arguments])
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")


@pytest.fixture
def call(capsys: pytest.CaptureFixture, tmp_path: Path):
    """What a tool's last line says."""

    def call(launcher: str, tool: str, *arguments: str) -> dict[str, Any]:
        if launcher == "plain":
            run_here(tool, *arguments)
            return json.loads(capsys.readouterr().out.splitlines()[-1])
        command = DDP if launcher == "DDP" else zero_3(tmp_path)
        done = run([*command, f"tools/{tool}.py", *arguments], Path("data"), is_ddp=launcher == "DDP")
        assert done.returncode == 0, done.stderr[-3000:]
        [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(line)

    return call


@pytest.fixture
def finetune(call, tmp_path: Path):
    """Two steps (an unused parameter fails on the second) that teach nothing, since the figures shall be the same."""
    save_start(tmp_path / "start")

    def finetune(launcher: str, tool: str, tree: dict[str, Any]) -> dict[str, Any]:
        config = {**run_settings(tmp_path / launcher, num_steps=2, lr=0.0), "start": {"checkpoint": str(tmp_path / "start")}}
        path = tmp_path / f"{launcher}.json"
        path.write_text(json.dumps({**config, **tree}), encoding="utf-8")  # JSON is YAML
        figures = call(launcher, tool, str(path))
        assert figures.pop("checkpoint") == str(tmp_path / launcher / "checkpoints" / "last")
        return figures

    return finetune


def vqa_tree(source: dict[str, Any], mode: str) -> dict[str, Any]:
    return {
        "data": {"sources": [source], "batch_size": 2, "max_tokens": 15, "num_workers": 0, "transform": TRANSFORM},
        "mode": mode, "answers": {"min_count": 1, "max_tokens": 4},
        "evaluate": {"sources": [source], "every": 2, "batch_size": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "launcher"), [("classify", "DDP"), pytest.param("classify", "ZeRO-3", marks=pytest.mark.soak), ("generate", "DDP")]
)
def test_the_accuracy_of_answers_is_the_same_at_any_number_of_processes(tmp_path: Path, finetune, mode: str, launcher: str):
    tree = vqa_tree(write_questions(tmp_path), mode)
    figures = finetune("plain", "finetune_vqa", tree)
    assert finetune(launcher, "finetune_vqa", tree) == figures
    assert figures["num_questions"] == 9.0


def test_every_question_has_the_same_answer_at_any_number_of_processes(tmp_path: Path, finetune, call):
    source = write_questions(tmp_path)
    figures = finetune("plain", "finetune_vqa", vqa_tree(source, "generate"))
    files = ["--questions", source["questions"], "--annotations", source["annotations"]]
    images = ["--images", *source["images"], "--image-name", source["image_name"], "--batch-size", "2"]
    results = [str(tmp_path / f"{launcher}_results.json") for launcher in ("plain", "DDP")]
    for launcher, out in zip(("plain", "DDP"), results):
        scored = call(launcher, "evaluate_vqa", str(tmp_path / "plain"), *files, *images, "--out", out)
        assert {name: figures[name] for name in scored} == scored
        assert call("plain", "evaluate_vqa", "--predictions", out, *files) == scored
    rows = [json.loads(Path(out).read_text(encoding="utf-8")) for out in results]
    assert rows[0] == rows[1]
    assert [row["question_id"] for row in rows[0]] == [100 + 7 * number for number in range(9)]
    answered = call("plain", "answer", str(tmp_path / "plain"), f"{source['images'][0]}/picture_0.png", "what colour is it ?")
    assert answered["answer"] == rows[0][0]["answer"]


@pytest.mark.parametrize("launcher", ["DDP", pytest.param("ZeRO-3", marks=pytest.mark.soak)])
def test_images_are_classified_alike_at_any_number_of_processes(tmp_path: Path, finetune, launcher: str):
    write_images(tmp_path / "images", num_each=3)
    tree = {
        "data": {"images": [str(tmp_path / "images")], "batch_size": 2, "num_workers": 0, "transform": TRANSFORM},
        "evaluate": {"images": [str(tmp_path / "images")], "every": 2, "batch_size": 2},
    }
    figures = finetune("plain", "finetune_classification", tree)
    assert finetune(launcher, "finetune_classification", tree) == figures
    assert figures["num_images"] == 9.0


def test_a_linear_probe_finds_the_same_at_any_number_of_processes(tmp_path: Path, call):
    save_start(tmp_path / "start")
    write_images(tmp_path / "train", num_each=3)
    write_images(tmp_path / "val", num_each=1)
    sources = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    options = ["--batch-size", "1", "--num-workers", "0"]
    figures = [call(launcher, "linear_probe", str(tmp_path / "start"), *sources, *options) for launcher in ("plain", "DDP")]
    assert figures[0] == figures[1]
    assert figures[0]["num_images"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "results.json"], "--predictions needs --annotations"),
        (["runs/none"], "give a checkpoint with --questions and --images"),
        (["runs/none", "--scenes", "val.tar"], "error: no checkpoint at runs/none"),
        (["--predictions", "nowhere.json", "--annotations", "none.json"], "error: none.json: no such file"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        run_here("evaluate_vqa", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
