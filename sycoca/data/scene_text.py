"""What is said about a rendered scene: captions with the objects they name, questions with answers. All of it is true."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sycoca.data.scene_layout import COLOURS, SHAPES, SceneObject, could_be, relation

CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
CLASS_TEMPLATES = ("a large {}", "a big {}", "there is a large {}", "a picture of a big {}", "the large {}")
"""Prompts for a scene's class, which is its one large object."""

SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
QUESTION_RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
NUMBERS = {1: "one", 2: "two", 3: "three"}
NUM_CAPTIONS = 5

PAIR_ON = (
    "{one} {where} {other} on {ground}",
    "on {ground}, {one} is {where} {other}",
    "{ground} with {one} {where} {other}",
)
PAIR = ("{one} {where} {other}", "{one} is {where} {other}", "there is {one} {where} {other}", "we see {one} {where} {other}")
SINGLE = ("there is {one}", "{one} on {ground}", "a picture of {one}", "{one} can be seen", "{one} in front of {ground}")
EVERY = ("{list} on {ground}", "{number} shapes: {list}", "there are {number} shapes, {list}", "a drawing of {list}")


class Caption(NamedTuple):
    """`named` are the indices, in the scene's objects, of those the text names."""

    text: str
    named: tuple[int, ...]


class Question(NamedTuple):
    """`type` is `colour`, `shape`, `count`, `exists`, `relation` or `background`."""

    question: str
    answer: str
    type: str


def describe(generator: np.random.Generator, objects: Sequence[SceneObject], *, texture: str) -> list[Caption]:
    """Five captions: a pair with the background, a pair, all objects, the first object, another object; or five of one."""
    if len(objects) == 1:
        return [_describe_single(generator, objects, index=0, texture=texture) for _ in range(NUM_CAPTIONS)]
    other = int(generator.integers(1, len(objects)))
    return [
        _describe_pair(generator, objects, templates=PAIR_ON, texture=texture),
        _describe_pair(generator, objects, templates=PAIR, texture=texture),
        _describe_all(generator, objects, texture),
        _describe_single(generator, objects, index=0, texture=texture),
        _describe_single(generator, objects, index=other, texture=texture),
    ]


def ask(generator: np.random.Generator, objects: Sequence[SceneObject], *, texture: str) -> list[Question]:
    """Questions with one right answer: how many, is there (yes and no alike), the background, and what the scene allows."""
    return [
        Question("how many shapes are there?", NUMBERS[len(objects)], "count"),
        Question("what is the background like?", texture, "background"),
        _ask_existence(generator, objects),
        *_ask_attributes(generator, objects),
        *_ask_relation(generator, objects),
    ]


def _pick(generator: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(generator.integers(len(options)))]


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _phrase(generator: np.random.Generator, item: SceneObject) -> str:
    if generator.random() < 0.5:
        return _with_article(item.name)
    return _with_article(f"{_pick(generator, SIZE_WORDS[item.size])} {item.name}")


def _describe_pair(
    generator: np.random.Generator, objects: Sequence[SceneObject], *, templates: Sequence[str], texture: str
) -> Caption:
    pairs = [(i, j) for i in range(len(objects)) for j in range(len(objects)) if i != j]
    clear = [(i, j, where) for i, j in pairs if (where := relation(objects[i].box, objects[j].box))]
    one, other, where = clear[int(generator.integers(len(clear)))]
    text = _pick(generator, templates).format(
        one=_phrase(generator, objects[one]),
        other=_phrase(generator, objects[other]),
        where=_pick(generator, RELATION_WORDS[where]),
        ground=_with_article(f"{texture} background"),
    )
    return Caption(text, (one, other))


def _describe_single(generator: np.random.Generator, objects: Sequence[SceneObject], *, index: int, texture: str) -> Caption:
    one = _phrase(generator, objects[index])
    return Caption(_pick(generator, SINGLE).format(one=one, ground=_with_article(f"{texture} background")), (index,))


def _describe_all(generator: np.random.Generator, objects: Sequence[SceneObject], texture: str) -> Caption:
    order = generator.permutation(len(objects)).tolist()
    phrases = [_phrase(generator, objects[index]) for index in order]
    text = _pick(generator, EVERY).format(
        list=", ".join(phrases[:-1]) + f" and {phrases[-1]}",
        number=NUMBERS[len(objects)],
        ground=_with_article(f"{texture} background"),
    )
    return Caption(text, tuple(order))


def _ask_existence(generator: np.random.Generator, objects: Sequence[SceneObject]) -> Question:
    """The wrong one shares the colour or the shape with an object that is there: neither alone gives the answer."""
    item = objects[int(generator.integers(len(objects)))]
    if generator.random() < 0.5:
        return Question(f"is there {_with_article(item.name)}?", "yes", "exists")
    present = {other.name for other in objects}
    near = [f"{item.colour} {shape}" for shape in SHAPES] + [f"{colour} {item.shape}" for colour in COLOURS]
    absent = [name for name in near if name not in present]
    return Question(f"is there {_with_article(_pick(generator, absent))}?", "no", "exists")


def _ask_attributes(generator: np.random.Generator, objects: Sequence[SceneObject]) -> list[Question]:
    shapes, colours = [item.shape for item in objects], [item.colour for item in objects]
    alone = [item for item in objects if shapes.count(item.shape) == 1]
    questions = []
    if alone:
        item = alone[int(generator.integers(len(alone)))]
        questions.append(Question(f"what colour is the {item.shape}?", item.colour, "colour"))
    alone = [item for item in objects if colours.count(item.colour) == 1]
    if alone:
        item = alone[int(generator.integers(len(alone)))]
        questions.append(Question(f"what shape is the {item.colour} thing?", item.shape, "shape"))
    return questions


def _ask_relation(generator: np.random.Generator, objects: Sequence[SceneObject]) -> list[Question]:
    """Asked only where one object is clearly in that direction and no other could be meant."""
    possible = []
    for item in objects:
        for direction, words in QUESTION_RELATIONS.items():
            near = [other for other in objects if other is not item and could_be(other.box, item.box, direction)]
            if len(near) == 1 and relation(near[0].box, item.box) == direction:
                possible.append(Question(f"what shape is {words} the {item.name}?", near[0].shape, "relation"))
    return [possible[int(generator.integers(len(possible)))]] if possible else []
