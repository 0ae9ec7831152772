"""Prompts for a language model: what was retrieved, put into a template, in an order, within a budget of tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sycoca.config import Config
from sycoca.types import ConfigError

SLOT = "{items}"
"""Where a template takes the retrieved items."""

Item = TypeVar("Item")


class Template(Config):
    """A prompt with a slot for retrieved items (captions, or words), of which each loses its final full stop."""

    text: str
    """Holds `{items}` once."""
    separator: str
    """Between two items."""
    without_items: str
    """The prompt where there is no item, or none fits."""

    @field_validator("text")
    @classmethod
    def _check_slot(cls, text: str) -> str:
        if text.count(SLOT) != 1:
            raise ValueError(f"expected {SLOT} once, where the retrieved items go")
        return text

    def fill(self, items: Sequence[str]) -> str:
        """The prompt with these items, in this order."""
        if not items:
            return self.without_items
        return self.text.replace(SLOT, self.separator.join(item.strip().rstrip(" .") for item in items))


TEMPLATES = {
    "sitta": Template(text="{items} A picture of", separator=" ", without_items="A picture of"),
    "sitta_instruction": Template(
        text="Generate a caption containing the following words: {items}", separator=", ", without_items="Generate a caption"
    ),
    "smallcap": Template(
        text="Similar images show\n\n{items}.\n\nThis image shows ", separator="\n\n", without_items="This image shows "
    ),
    "recap": Template(
        text="Similar images show\n\n{items}.\n\nThis image shows", separator="\n\n", without_items="This image shows"
    ),
}
"""The papers' prompts. SmallCap's ends in a space, as it was trained; ReCap's language model is not trained, and a word that
follows a space token of its own is rare in what such models have read."""

TemplateName = Literal["sitta", "sitta_instruction", "smallcap", "recap"]


class PromptConfig(Config):
    """Which items of a ranked list go into the prompt, in which order, and how long it may be."""

    template: Template | TemplateName = "smallcap"
    num_items: int = Field(default=4, ge=0)
    order: Literal["rank", "permute", "sample"] = "rank"
    """`rank`: the first `num_items`, best first; `permute`: the same in a random order; `sample`: `num_items` drawn from the
    first `pool`, best first (in training it keeps a model from copying what most retrieved captions have)."""
    pool: int | None = Field(default=None, ge=1)
    """Of `sample` only: how many of the best are drawn from."""
    max_tokens: int = Field(default=128, ge=1)
    """Tokens of the prompt at most; items are left out from the end of the prompt's list until it fits."""

    @model_validator(mode="after")
    def _check(self) -> "PromptConfig":
        if (self.pool is not None) != (self.order == "sample"):
            raise ValueError(f"pool belongs to order: sample, and it needs one; found order {self.order!r}, pool {self.pool}")
        if self.pool is not None and self.pool < self.num_items:
            raise ValueError(f"pool is {self.pool}, fewer than num_items = {self.num_items}")
        return self

    def find_template(self) -> Template:
        """The template itself, where a paper's is named too."""
        return self.template if isinstance(self.template, Template) else TEMPLATES[self.template]


def arrange_items(ranked: Sequence[Item], config: PromptConfig, generator: Random) -> list[Item]:
    """Those of the ranked items (best first) that go into a prompt, in their order there; the same for equal generators."""
    num = config.num_items
    match config.order:
        case "rank":
            return list(ranked[:num])
        case "permute":
            return generator.sample(ranked[:num], k=len(ranked[:num]))
        case "sample":
            places = range(len(ranked[: config.pool]))
            return [ranked[place] for place in sorted(generator.sample(places, k=min(num, len(places))))]


def encode_prompt(items: Sequence[str], config: PromptConfig, encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of the prompt with as many of the first items as fit into `max_tokens`; the template is never cut.

    Raises ConfigError where not even the template alone fits.
    """
    template = config.find_template()
    for num in range(len(items), -1, -1):
        ids = encode(template.fill(items[:num]))
        if len(ids) <= config.max_tokens:
            return ids
    num_tokens = len(encode(template.without_items))
    raise ConfigError(f"prompt.max_tokens: {config.max_tokens}; {template.without_items!r} alone has {num_tokens}, raise it")


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of a batch, padded on the left so that what is written next stands right behind each."""

    token_NL: Tensor
    """int64."""
    is_real_NL: Tensor
    """bool: False on padding."""

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same batch on a device."""
        return PromptBatch(self.token_NL.to(device), self.is_real_NL.to(device))

    def repeat(self, num: int) -> "PromptBatch":
        """Each row `num` times, copies side by side."""
        return PromptBatch(self.token_NL.repeat_interleave(num, dim=0), self.is_real_NL.repeat_interleave(num, dim=0))


def pad_prompts(rows: Iterable[Sequence[int]], pad: int) -> PromptBatch:
    """A batch of prompts' ids, as wide as the longest; rows may be empty where a prefix stands for the prompt."""
    ids = [list(row) for row in rows]
    width = max(map(len, ids), default=0)
    token_NL = torch.tensor([[pad] * (width - len(row)) + row for row in ids], dtype=torch.int64).reshape(len(ids), width)
    num_real_N = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    return PromptBatch(token_NL, torch.arange(width) >= width - num_real_N[:, None])
