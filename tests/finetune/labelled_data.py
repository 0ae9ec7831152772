"""Tiny checkpoints to fine-tune, and tiny labelled data: images of one colour each, with their class and with questions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import IMAGE_SIZE, model_config, shake
from PIL import Image
from safetensors.torch import save_file

from sycoca.data.tokenizer import Tokenizer, build_tokenizer, train_word_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.log import logger
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.pretrained import MODEL_PREFIX, PretrainedConfig, save_description

COLOURS = {"red": (250, 20, 10), "green": (20, 230, 40), "blue": (10, 40, 240)}
ASKED = "what colour is it ?", "is it red ?", "which colour other than red is in this whole picture here ?"
"""Questions of different lengths."""
MAX_TOKENS = 20
PARTS: tuple[Part, ...] = ("contrast", "text", "text_decoder")
TRANSFORM = {"size": IMAGE_SIZE, "train": "resize", "eval": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture
def loud_logger() -> Iterator[None]:
    """The package's logger as other tests expect it, after a run has set its own console up."""
    kept = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])


def build_word_tokenizer(folder: Path) -> Tokenizer:
    """Of the words that questions and answers have."""
    train_word_tokenizer([*ASKED, *COLOURS, "yes no dark navy blue"], folder)
    return build_tokenizer(folder)


def save_start(folder: Path, *, parts: Sequence[Part] = PARTS) -> Path:
    """A checkpoint of a tiny model with noisy weights."""
    folder.mkdir(parents=True)
    tokenizer = build_word_tokenizer(folder / "words")
    torch.manual_seed(0)
    model = SyCoCa(model_config(), vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=set(parts))
    shake(model)
    save_file({MODEL_PREFIX + name: value for name, value in model.state_dict().items()}, folder / "model.safetensors")
    config = PretrainedConfig(
        model=model_config(), parts=list(parts), transform=TransformConfig.model_validate(TRANSFORM),
        relevance=RelevanceConfig(), max_tokens=MAX_TOKENS,
    )  # fmt: skip
    save_description(folder, tokenizer, config)
    return folder


def write_images(root: Path, *, num_each: int = 2) -> list[Path]:
    """`<root>/<colour>/<n>.png`, shades of each colour."""
    paths = []
    for colour, (red, green, blue) in COLOURS.items():
        (root / colour).mkdir(parents=True)
        for number in range(num_each):
            paths.append(root / colour / f"{number}.png")
            Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (red - number, green - 3 * number, blue - 2 * number)).save(paths[-1])
    return paths


def answer_to(question: str, colour: str) -> str:
    """The right answer about an image of that colour."""
    match ASKED.index(question):
        case 0:
            return "navy blue" if colour == "blue" else colour
        case 1:
            return "yes" if colour == "red" else "no"
        case _:
            return "no" if colour == "red" else colour


def write_questions(folder: Path) -> dict[str, Any]:
    """Every question about one image of each colour, as VQA v2's JSON files; gives the source, as a configuration has it."""
    paths = write_images(folder / "images", num_each=1)
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, path in enumerate(paths):
        (folder / "images" / f"picture_{image_id}.png").write_bytes(path.read_bytes())
        for text in ASKED:
            question_id, answer = 100 + 7 * len(questions), answer_to(text, path.parent.name)
            questions.append({"question_id": question_id, "image_id": image_id, "question": text})
            annotations.append({
                "question_id": question_id, "image_id": image_id, "multiple_choice_answer": answer, "question_type": text[:4],
                "answer_type": "yes/no" if answer in ("yes", "no") else "other", "answers": [{"answer": answer}] * 10,
            })  # fmt: skip
    (folder / "questions.json").write_text(json.dumps({"questions": questions}), encoding="utf-8")
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}), encoding="utf-8")
    return {
        "type": "files", "questions": str(folder / "questions.json"), "annotations": str(folder / "annotations.json"),
        "images": [str(folder / "images")], "image_name": "picture_{}.png",
    }  # fmt: skip


def run_settings(folder: Path, *, num_steps: int, lr: float, **optim: Any) -> dict[str, Any]:
    """`run` and `optim` of a short experiment."""
    run = {"folder": str(folder), "precision": "fp32", "log_every": 50, "checkpoint_every": num_steps, "tensorboard": False}
    return {"run": run, "optim": {"lr": lr, "num_steps": num_steps, "warmup_steps": 1, "weight_decay": 0.0, **optim}}
