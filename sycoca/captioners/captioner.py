"""What every lightweight captioner can do, what it says of a caption, and the folder that it is kept in.

    FOLDER/captioner.json     its kind and configuration, the encoder's name and fingerprint, the language model
           fit.json           what fitting it took
           ...                the parts that were fitted
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.captioners.storage import read_facts
from sycoca.data.shard_writer import save_text
from sycoca.types import DataError

KIND = "captioner"
_FACTS, _FIT = "captioner.json", "fit.json"


@dataclass(frozen=True, slots=True)
class Written:
    """What a captioner wrote for one image, and why."""

    caption: str
    retrieved: list[str]
    """Words or captions that went into the prompt, best first; none for a captioner without retrieval."""
    candidates: list[str]
    """What was chosen among."""
    scores: list[float]
    """Of the candidates, by the captioner's scorer."""


class LightCaptioner(Protocol):
    """A captioner on a frozen encoder and a language model. Satisfies Captioner.

    Pixels are the encoder's transform of an image. A key names an image, and nobody retrieves the captions of an image of that
    name; an empty one is nobody's.
    """

    kind: ClassVar[str]
    encoder: FrozenEncoder

    def explain(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[Written]:
        """A caption an image, with what it was made of."""
        ...

    def caption(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[str]:
        """A caption an image."""
        ...

    def save(self, folder: Path) -> None:
        """Write its facts (`save_captioner`) and what was fitted; encoder and frozen language model stay where they are."""
        ...

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """What `save` wrote. Raises DataError, CheckpointError, ConfigError where a part is missing or does not belong."""
        ...


def save_captioner(captioner: LightCaptioner, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write captioner.json: plain facts, to which the captioner's kind and its encoder are added."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = {"name": captioner.encoder.name, "fingerprint": captioner.encoder.fingerprint}
    whole = {"kind": KIND, "captioner": captioner.kind, "encoder": encoder, **facts}
    save_text(folder / _FACTS, json.dumps(whole, indent=1))


def read_captioner(folder: Path) -> dict[str, Any]:
    """The facts that `save_captioner` wrote. Raises DataError for another folder."""
    return read_facts(folder / _FACTS, kind=KIND)


def is_captioner(path: Path) -> bool:
    """Whether a captioner was saved there."""
    return (path / _FACTS).is_file()


def load_its_encoder(folder: Path, device: torch.device | str) -> FrozenEncoder:
    """The encoder that the captioner was fitted with, by name. Raises DataError where another one has that name now."""
    facts = read_captioner(folder)["encoder"]
    encoder = load_encoder(facts["name"], device)
    if encoder.fingerprint != facts["fingerprint"]:
        raise DataError(
            f"{folder}: fitted with {facts['name']} as it was then ({facts['fingerprint']}), and there is another now "
            f"({encoder.fingerprint}): encoder and captioner do not belong together. Fit the captioner again"
        )
    return encoder


def write_fit(folder: Path, facts: Mapping[str, Any]) -> None:
    """Keep what fitting took beside the captioner, `fit_seconds` among it."""
    save_text(folder / _FIT, json.dumps(dict(facts), indent=1))


def read_fit(folder: Path) -> dict[str, Any]:
    """What `write_fit` kept; nothing where it is not known."""
    path = folder / _FIT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
