"""Zero-shot classification and its image sources, on encoders whose answers are known."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sycoca.evaluation.class_prompts import TEMPLATE_SETS, read_classes, read_templates
from sycoca.evaluation.image_sources import batch_images, labelled_images, list_labels
from sycoca.evaluation.zero_shot import (
    ZeroShotEvaluator,
    accuracy_metrics,
    class_table,
    embed_classes,
    label_places,
    match_labels,
)
from sycoca.types import DataError
from tests.forks import run_ranks

CLASSES = [f"class {number}" for number in range(7)]
TEMPLATES = ["a {}", "the {} here"]


class NoisyEncoder:
    """A class's prompts and images lie about its own direction; an image holds its class and its number."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return torch.stack([direction(int(image[0, 0, 0]), 50 + int(image[1, 0, 0])) for image in image_BCHW])

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([direction(int("".join(filter(str.isdigit, text)) or 0), len(text)) for text in texts])


def direction(number: int, salt: int) -> Tensor:
    centre_E = torch.randn(5, generator=torch.Generator().manual_seed(number))
    return (1 + salt % 3) * (centre_E + torch.randn(5, generator=torch.Generator().manual_seed(999 * salt + number)))


def make_batches(numbers: range | list[int], batch_size: int) -> list[dict]:
    """Image n has class n % 6; the last class has no image."""
    batches = []
    for start in range(0, len(numbers), batch_size):
        number_B = torch.tensor(list(numbers[start : start + batch_size]))
        image_BC = torch.stack([number_B % 6, number_B, number_B], 1).float()
        batches.append({"image": image_BC[:, :, None, None].expand(-1, -1, 2, 2), "label": number_B % 6})
    return batches


def save_image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "blue").save(file, "PNG")
    return file.getvalue()


def test_a_class_is_the_unit_mean_of_its_unit_prompts():
    class_NE = embed_classes(NoisyEncoder(), CLASSES, TEMPLATES, batch_size=3)
    for name, class_E in zip(CLASSES, class_NE, strict=True):
        prompt_NE = NoisyEncoder().encode_text([template.replace("{}", name) for template in TEMPLATES])
        mean_E = (prompt_NE / prompt_NE.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(class_E, mean_E / mean_E.norm())


def test_accuracies_equal_a_loop_over_images():
    evaluator = ZeroShotEvaluator(make_batches(range(40), 7), class_names=CLASSES, templates=TEMPLATES)
    class_NE = embed_classes(NoisyEncoder(), CLASSES, TEMPLATES, batch_size=100)
    hits = {label: [] for label in range(6)}
    for number in range(40):
        order = (class_NE @ F.normalize(direction(number % 6, 50 + number), dim=0)).argsort(descending=True).tolist()
        hits[number % 6].append((order[0] == number % 6, number % 6 in order[:5]))
    flat = [hit for rows in hits.values() for hit in rows]
    metrics = evaluator(NoisyEncoder())
    assert metrics["top_1"] == pytest.approx(100 * sum(first for first, _ in flat) / 40)
    assert metrics["top_5"] == pytest.approx(100 * sum(five for _, five in flat) / 40)
    per_class = [100 * sum(first for first, _ in rows) / len(rows) for rows in hits.values()]
    assert metrics["mean_per_class"] == pytest.approx(sum(per_class) / 6)
    assert 0 < metrics["top_1"] < metrics["top_5"] < 100
    table = class_table(evaluator.count(NoisyEncoder()), CLASSES)
    assert [row["top_1"] for row in table.values()] == pytest.approx(per_class)
    assert accuracy_metrics(evaluator.count(NoisyEncoder())) == metrics


def test_classes_that_embed_alike_are_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sycoca.log.logger.propagate", True)
    ZeroShotEvaluator(make_batches(range(7), 7), class_names=CLASSES, templates=TEMPLATES)(NoisyEncoder())
    assert not caplog.text
    names = [*CLASSES[:5], CLASSES[1], CLASSES[1]]
    ZeroShotEvaluator(make_batches(range(7), 7), class_names=names, templates=TEMPLATES)(NoisyEncoder())
    assert "distinct embeddings: 5, of 7 classes" in caplog.text


@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_constant_and_broken_embeddings_come_last(value: float):
    place_B = label_places(torch.full((3, 4), value), torch.full((9, 4), value), torch.tensor([0, 8, 4]))
    assert place_B.tolist() == [9, 9, 9]


@pytest.mark.slow
def test_two_processes_with_uneven_shares_give_the_numbers_of_one():
    found = run_ranks(evaluate_shares, 2)
    alone = ZeroShotEvaluator(make_batches(range(40), 7), class_names=CLASSES, templates=TEMPLATES)(NoisyEncoder())
    assert found == [[alone] * len(SIZES_OF_FIRST_SHARE)] * 2


def test_a_folder_and_a_tar_of_the_same_layout_give_the_same_images(tmp_path: Path):
    for name, colour in (("cat/1.png", "red"), ("cat/0.png", "lime"), ("toy_car/0.JPG", "blue")):
        save_image(tmp_path / "val" / name, colour)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "val", "val")
    pixels = {}
    for source in (tmp_path / "val", tmp_path / "val.tar"):
        rows = list(labelled_images([str(source)]))
        pixels[source] = sorted((row.label, row.image.getpixel((0, 0))) for row in rows)
        assert list_labels([str(source)]) == ["cat", "toy_car"]
    assert len(set(map(str, pixels.values()))) == 1
    assert [label for label, _ in pixels[tmp_path / "val"]] == ["cat", "cat", "toy_car"]


def test_shards_label_by_class_name_then_label_then_cls(tmp_path: Path):
    members = {
        "a.mask.png": b"no image",
        "a.png": png_bytes(),
        "a.json": b'{"class_name": "red cube", "label": 3}',
        "b.png": png_bytes(),
        "b.json": b'{"label": 4}',
        "b.cls": b"9",
        "c.png": png_bytes(),
        "c.cls": b"5\n",
    }
    write_tar(tmp_path / "val-00.tar", members)
    rows = list(labelled_images([str(tmp_path)]))
    assert [row.label for row in rows] == ["red cube", 4, 5]
    assert [row.label for row in labelled_images([str(tmp_path)], rank=1, world_size=2)] == [4]
    assert list_labels([str(tmp_path / "val-{00..00}.tar")]) == ["red cube", 4, 5]


def test_batches_hold_every_image_once(tmp_path: Path):
    for number in range(5):
        save_image(tmp_path / ("cat" if number < 3 else "dog") / f"{number}.png")
    images = labelled_images([str(tmp_path)])
    batches = list(batch_images(images, lambda image: torch.zeros(3, 2, 2), places={"cat": 0, "dog": 1}, batch_size=2))
    assert [batch["label"].tolist() for batch in batches] == [[0, 0], [0, 1], [1]]
    assert batches[0]["image"].shape == (2, 3, 2, 2)


def test_damaged_sources_are_named(tmp_path: Path):
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="cat: a class folder without images"):
        list_labels([str(tmp_path / "folder")])
    (tmp_path / "folder" / "cat" / "0.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DataError, match=r"0\.jpg: the image cannot be read"):
        list(labelled_images([str(tmp_path / "folder")]))
    with pytest.raises(DataError, match="no such shard or folder"):
        list_labels([str(tmp_path / "absent")])
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="not a whole tar"):
        list_labels([str(tmp_path / "text.tar")])
    with pytest.raises(DataError, match="no label"):
        list_labels([str(write_tar(tmp_path / "bare.tar", {"a.png": png_bytes()}))])


def test_labels_are_matched_by_name_number_or_order():
    classes = ["toy car", "cat", "Dog"]
    assert match_labels(["cat", "toy_car"], classes) == {"cat": 1, "toy_car": 0}
    assert match_labels([0, 2], classes) == {0: 0, 2: 2}
    assert match_labels(["n03", "n01", "n02"], classes) == {"n01": 0, "n02": 1, "n03": 2}
    with pytest.raises(DataError, match="'bird' is not among the 3 classes"):
        match_labels(["bird", "cat"], classes)
    with pytest.raises(DataError, match="label 3"):
        match_labels([3], classes)


def test_classes_and_templates_come_from_sets_and_files(tmp_path: Path):
    assert (len(read_classes("cifar10")), len(read_classes("imagenet"))) == (10, 1000)
    assert (len(read_templates("openai")), len(read_templates("simple"))) == (80, 7)
    assert all("{}" in template for templates in TEMPLATE_SETS.values() for template in templates)
    (tmp_path / "both.json").write_text(json.dumps({"class_names": ["a", "b"], "templates": ["one {}"]}))
    assert read_classes(str(tmp_path / "both.json")) == ["a", "b"]
    assert read_templates(str(tmp_path / "both.json")) == ["one {}"]
    (tmp_path / "lines.txt").write_text("red cube\n\nblue ball\n")
    assert read_classes(str(tmp_path / "lines.txt")) == ["red cube", "blue ball"]
    with pytest.raises(DataError, match="where the class goes"):
        read_templates(str(tmp_path / "lines.txt"))
    with pytest.raises(DataError, match="neither a file nor one of cifar10, imagenet"):
        read_classes("cifar")


SIZES_OF_FIRST_SHARE = (13, 40)  # of 40 images; the second rank has the others, in the end none


def evaluate_shares() -> list[dict[str, float]]:
    """On one rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = []
    for size in SIZES_OF_FIRST_SHARE:
        batches = make_batches([range(size), range(size, 40)][rank], 4)
        evaluator = ZeroShotEvaluator(batches, class_names=CLASSES, templates=TEMPLATES, text_batch_size=3)
        found.append(evaluator(NoisyEncoder()))
    return found
