"""Whether captions of the embedded scenes are right: every object that is named must be there, colour and shape."""

import re
from collections.abc import Sequence

from sycoca.data.scene_layout import COLOURS, SHAPES

_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def named_objects(caption: str) -> list[str]:
    """The objects a caption names, `colour shape`, in its order."""
    return [" ".join(found) for found in _OBJECT.findall(caption)]


def score_captions(captions: Sequence[str], objects: Sequence[Sequence[str]]) -> dict[str, float]:
    """Percent of captions, given each scene's objects as `colour shape`.

    `all_right`: names at least one object, and all it names are there. `first_right`: the first one it names is there.
    """
    named = [named_objects(caption) for caption in captions]
    pairs = list(zip(named, objects, strict=True))
    all_right = sum(bool(names) and set(names) <= set(there) for names, there in pairs)
    first_right = sum(bool(names) and names[0] in there for names, there in pairs)
    return {"all_right": 100 * all_right / len(pairs), "first_right": 100 * first_right / len(pairs)}
