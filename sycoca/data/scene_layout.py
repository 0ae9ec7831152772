"""What is where in a rendered scene: the objects, their boxes, their relations."""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 50),
    "green": (40, 175, 60),
    "cyan": (70, 215, 225),
    "blue": (45, 80, 235),
    "purple": (160, 50, 200),
    "white": (245, 245, 245),
}
TEXTURES = ("plain", "striped", "checked", "dotted", "speckled", "shaded")
PROB_NUM_OBJECTS = (0.5, 0.3, 0.2)
"""Of one, two and three objects. From scenes of several alone, ten minutes of training teach colours and no shapes."""
DIAMETER_SHARE = {"large": (0.44, 0.54), "small": (0.26, 0.32)}
"""Least and greatest diameter, as shares of the image's side; the two never meet."""
GAP_SHARE = 0.04
"""Least free space between two objects' boxes, and half of it to the image's edge."""
CLEAR_RATIO = 1.5
"""A relation is named only where one offset between the centres is this many times the other."""
NUM_CANDIDATES = 64

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. `box` is (left, top, right, bottom) in pixels, right and bottom exclusive; boxes are squares."""

    shape: str
    colour: str
    size: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def sample_objects(generator: np.random.Generator, *, size: int) -> list[SceneObject]:
    """One to three objects in a square image of `size` pixels.

    The first is large, the others small; no two share both shape and colour; no two boxes meet; the first and the second
    stand in a clear relation.
    """
    num_objects = 1 + int(generator.choice(len(PROB_NUM_OBJECTS), p=PROB_NUM_OBJECTS))
    kinds = generator.choice(len(SHAPES) * len(COLOURS), num_objects, replace=False)
    boxes: list[Box] = []
    while len(boxes) < num_objects:
        box = _sample_box(generator, boxes, size=size)
        boxes = [] if box is None else [*boxes, box]  # no room left: start again
    colours = list(COLOURS)
    return [
        SceneObject(SHAPES[kind % len(SHAPES)], colours[kind // len(SHAPES)], "small" if place else "large", boxes[place])
        for place, kind in enumerate(kinds)
    ]


def relation(one: Box, other: Box) -> str | None:
    """Where `one` is, seen from `other`: `left`, `right`, `above`, `below`; None where it is not clear."""
    right, down = _offset(one, other)
    if abs(right) >= CLEAR_RATIO * abs(down):
        return "right" if right > 0 else "left"
    if abs(down) >= CLEAR_RATIO * abs(right):
        return "below" if down > 0 else "above"
    return None


def could_be(one: Box, other: Box, direction: str) -> bool:
    """Whether somebody might say that `one` lies in that direction from `other`, clear or not."""
    right, down = _offset(one, other)
    return {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}[direction]


def _offset(one: Box, other: Box) -> tuple[float, float]:
    return (one[0] + one[2] - other[0] - other[2]) / 2, (one[1] + one[3] - other[1] - other[3]) / 2


def _sample_box(generator: np.random.Generator, taken: list[Box], *, size: int) -> Box | None:
    least, greatest = DIAMETER_SHARE["small" if taken else "large"]
    diameter = int(generator.integers(round(least * size), round(greatest * size) + 1))
    gap = max(1, round(GAP_SHARE * size))
    corners = generator.integers(gap // 2, size - diameter - gap // 2 + 1, size=(NUM_CANDIDATES, 2))
    for left, top in corners.tolist():
        box = (left, top, left + diameter, top + diameter)
        if all(_is_apart(box, other, gap) for other in taken) and (len(taken) != 1 or relation(taken[0], box)):
            return box
    return None


def _is_apart(one: Box, other: Box, gap: int) -> bool:
    return one[2] + gap <= other[0] or other[2] + gap <= one[0] or one[3] + gap <= other[1] or other[3] + gap <= one[1]
