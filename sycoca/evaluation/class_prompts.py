"""Names of classes and the prompts they are put into: the usual sets, and files of one's own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip

from sycoca.data.scene_text import CLASS_TEMPLATES
from sycoca.types import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASS_SETS: dict[str, Sequence[str]] = {"cifar10": CIFAR10_CLASSES, "imagenet": open_clip.IMAGENET_CLASSNAMES}
TEMPLATE_SETS: dict[str, Sequence[str]] = {
    "openai": [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES],
    "simple": [fill("{}") for fill in open_clip.SIMPLE_IMAGENET_TEMPLATES],
    "scenes": CLASS_TEMPLATES,
}
"""`openai` has 80 prompts, `simple` the 7 that CLIP's authors found to do nearly as well; `{}` stands for the class."""


def read_classes(name: str) -> list[str]:
    """A built-in set by name, or a file: .txt, a class a line; .json, a list or with `class_names`. Raises DataError."""
    return list(CLASS_SETS[name]) if name in CLASS_SETS else _read_list(name, "class_names", known=CLASS_SETS)


def read_templates(name: str) -> list[str]:
    """A built-in set by name, or a file: .txt, a prompt a line; .json, a list or with `templates`. Raises DataError."""
    if name in TEMPLATE_SETS:
        return list(TEMPLATE_SETS[name])
    templates = _read_list(name, "templates", known=TEMPLATE_SETS)
    for template in templates:
        if "{}" not in template:
            raise DataError(f"{name}: the prompt {template!r} has no {{}} where the class goes")
    return templates


def _read_list(name: str, entry: str, *, known: Mapping[str, Any]) -> list[str]:
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{name}: neither a file nor one of {', '.join(known)}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: not JSON ({error})") from error
        found = tree.get(entry) if isinstance(tree, dict) else tree
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise DataError(f"{name}: expected a list of texts (in JSON, at the top or as {entry!r})")
    return found
