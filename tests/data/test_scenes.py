"""Rendered scenes: what is said is what is drawn."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sycoca.data.scene_layout import COLOURS, SHAPES
from sycoca.data.scene_text import CLASS_NAMES, CLASS_TEMPLATES
from sycoca.data.scenes import VAL_START, Scene, invent_scene, render_scene, write_scenes
from sycoca.data.tokenizer import build_tokenizer
from sycoca.types import DataError

SIZE = 48
NUM_SCENES = 60


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(3, index, size=SIZE) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "out"
    write_scenes(folder, num_train=5, num_val=3, size=SIZE, seed=1, samples_per_shard=2)
    return folder


def read_members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def find_centre(mask_HW: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask_HW)
    return columns.mean(), rows.mean()


def test_a_scene_is_a_function_of_seed_and_index():
    one, same = render_scene(3, 7, size=SIZE), render_scene(3, 7, size=SIZE)
    assert one.image.tobytes() == same.image.tobytes()
    assert one.facts == same.facts == invent_scene(3, 7, size=SIZE)
    assert one.image.tobytes() != render_scene(4, 7, size=SIZE).image.tobytes()
    assert one.image.tobytes() != render_scene(3, 8, size=SIZE).image.tobytes()


def test_masks_lie_in_their_boxes_and_never_meet(scenes: list[Scene]):
    for scene in scenes:
        assert scene.mask_NHW.shape == (len(scene.facts.objects), SIZE, SIZE)
        assert scene.mask_NHW.sum(axis=0).max() == 1
        for mask_HW, item in zip(scene.mask_NHW, scene.facts.objects, strict=True):
            left, top, right, bottom = item.box
            assert mask_HW.any()
            assert mask_HW.sum() == mask_HW[top:bottom, left:right].sum()


def test_a_mask_covers_pixels_of_the_objects_colour(scenes: list[Scene]):
    names = list(COLOURS)
    for scene in scenes:
        pixel_HWC = np.asarray(scene.image, dtype=float)
        for mask_HW, item in zip(scene.mask_NHW, scene.facts.objects, strict=True):
            colour_C = np.median(pixel_HWC[mask_HW], axis=0)
            distances = [np.abs(colour_C - COLOURS[name]).sum() for name in names]
            assert names[int(np.argmin(distances))] == item.colour


def test_the_large_object_is_the_first_and_gives_the_class(scenes: list[Scene]):
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == len(COLOURS) * len(SHAPES)
    for scene in scenes:
        objects = scene.facts.objects
        assert [item.size for item in objects] == ["large"] + ["small"] * (len(objects) - 1)
        sides = [item.box[2] - item.box[0] for item in objects]
        assert sides[0] > 1.3 * max(sides[1:], default=0)
        assert CLASS_NAMES[scene.facts.label] == f"{objects[0].colour} {objects[0].shape}"


def test_captions_name_exactly_the_objects_that_they_list(scenes: list[Scene]):
    pattern = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
    for scene in scenes:
        for caption in scene.facts.captions:
            said = [" ".join(match) for match in pattern.findall(caption.text)]
            assert said == [scene.facts.objects[index].name for index in caption.named]


def test_captions_name_the_right_sizes_and_background(scenes: list[Scene]):
    kinds = {"large": "large", "big": "large", "small": "small", "little": "small"}
    pattern = re.compile(rf"({'|'.join(kinds)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
    for scene in scenes:
        sizes = {item.name: item.size for item in scene.facts.objects}
        for caption in scene.facts.captions:
            assert all(sizes[f"{colour} {shape}"] == kinds[word] for word, colour, shape in pattern.findall(caption.text))
            assert re.findall(r"(\w+) background", caption.text) in ([], [scene.facts.texture])


def test_relations_in_captions_hold_between_the_masks(scenes: list[Scene]):
    num_checked = 0
    for scene in scenes:
        for caption in scene.facts.captions:
            match = re.search(r"left of|right of|above|over|below|under", caption.text)
            if not match:
                continue
            (x, y), (other_x, other_y) = (find_centre(scene.mask_NHW[index]) for index in caption.named)
            holds = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "over": y < other_y}
            assert {**holds, "below": y > other_y, "under": y > other_y}[match.group()]
            num_checked += 1
    assert num_checked == 2 * sum(len(scene.facts.objects) > 1 for scene in scenes) > NUM_SCENES / 2


def test_scenes_of_several_objects_have_captions_that_leave_one_out(scenes: list[Scene]):
    assert {len(scene.facts.objects) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        assert len(scene.facts.captions) == 5
        num_single = sum(len(caption.named) == 1 for caption in scene.facts.captions)
        assert num_single == (5 if len(scene.facts.objects) == 1 else 2)


def test_the_vocabulary_is_small_and_articles_are_right():
    texts = [caption.text for index in range(400) for caption in invent_scene(0, index).captions]
    assert len({word for text in texts for word in re.findall(r"\w+", text)}) < 150
    assert not [text for text in texts if re.search(r"\ba [aeiou]|\ban [^aeiou]", text)]
    assert all(re.search(r"^a (?=red)|^an (?=orange)|\{\}", template) for template in CLASS_TEMPLATES)


def test_answers_agree_with_the_objects():
    seen = set()
    for index in range(200):
        facts = invent_scene(0, index)
        names = {item.name for item in facts.objects}
        for question, answer, kind in facts.questions:
            seen.add(kind)
            words = question.rstrip("?").split()
            if kind == "colour":
                assert f"{answer} {words[-1]}" in names
            elif kind == "shape":
                assert f"{words[-2]} {answer}" in names
            elif kind == "exists":
                assert (answer == "yes") == (" ".join(words[-2:]) in names)
            elif kind == "count":
                assert {"one": 1, "two": 2, "three": 3}[answer] == len(facts.objects)
            elif kind == "relation":
                assert answer in {item.shape for item in facts.objects if item.name != " ".join(words[-2:])}
    assert seen == {"colour", "shape", "exists", "count", "relation", "background"}


def test_yes_and_no_are_about_as_frequent():
    answers = [q.answer for i in range(300) for q in invent_scene(0, i).questions if q.type == "exists"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_a_samples_files_agree_with_the_scene(folder: Path):
    members = read_members(folder / "val-00000.tar")
    scene = render_scene(1, VAL_START, size=SIZE)
    assert sorted(name.partition(".")[2] for name in members) == ["jpg", "jpg", "json", "json", "mask.png", "mask.png"]
    image = np.asarray(Image.open(io.BytesIO(members["val0000000.jpg"])), dtype=int)
    assert np.abs(image - np.asarray(scene.image, dtype=int)).mean() < 3
    number_HW = np.asarray(Image.open(io.BytesIO(members["val0000000.mask.png"])))
    meta = json.loads(members["val0000000.json"])
    assert [caption.text for caption in scene.facts.captions] == meta["captions"]
    assert [list(caption.named) for caption in scene.facts.captions] == meta["caption_objects"]
    assert meta["class_name"] == CLASS_NAMES[meta["label"]] == scene.facts.objects[0].name
    assert len(meta["objects"]) == number_HW.max()
    for number, mask_HW in enumerate(scene.mask_NHW, start=1):
        assert np.array_equal(number_HW == number, mask_HW)


def test_the_folder_holds_what_the_tasks_need(folder: Path):
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        "train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar", "val-00001.tar"
    ]  # fmt: skip
    assert len((folder / "captions.txt").read_text().splitlines()) == 5 * 5
    assert json.loads((folder / "classes.json").read_text()) == {
        "class_names": list(CLASS_NAMES),
        "templates": list(CLASS_TEMPLATES),
    }
    assert (folder / "tokenizer" / "tokenizer.json").exists()


def test_the_tokenizer_knows_the_words_of_questions_and_answers_too(folder: Path):
    tokenizer = build_tokenizer(folder / "tokenizer")
    for question in (question for index in range(5) for question in invent_scene(1, index, size=SIZE).questions):
        asked = f"{question.question} {question.answer}"
        assert tokenizer.decode(tokenizer.encode(asked, 40)).replace(" ", "") == asked.replace(" ", "")
    assert tokenizer.decode(tokenizer.encode("how many", 40)) == "how many"


def test_a_complete_folder_is_left_as_it_is(folder: Path):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    result = write_scenes(folder, num_train=5, num_val=3, size=SIZE, seed=1, samples_per_shard=2)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert result["num_train"] == 5


def test_a_folder_of_other_scenes_is_refused(folder: Path):
    with pytest.raises(DataError, match="seed: 1 there, 2 now"):
        write_scenes(folder, num_train=5, num_val=3, size=SIZE, seed=2, samples_per_shard=2)


def test_too_small_images_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="32 pixels"):
        write_scenes(tmp_path, num_train=5, num_val=3, size=16)
