"""Captions as a language model learns them without images: each behind a prompt of other captions, or behind none."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from random import Random
from typing import Any

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.prompt import PromptConfig, arrange_items, encode_prompt, pad_prompts
from sycoca.captioners.words import content_words
from sycoca.config import Config
from sycoca.data.decode import CaptionConfig
from sycoca.data.stream import fingerprint
from sycoca.types import CheckpointError, DataError


class PromptedConfig(Config):
    """Which captions are learnt, and what stands before them."""

    texts: list[str]
    """Shards, folders of them or patterns, and text files (data/caption_texts.py)."""
    captions: CaptionConfig = CaptionConfig()
    batch_size: int = Field(ge=1)
    """Captions a process and step."""
    max_tokens: int = Field(default=40, ge=2)
    """Of a caption, its end counted; a longer one loses its last words."""
    prompt: PromptConfig = PromptConfig()
    prompted_share: float = Field(default=0.8, ge=0, le=1)
    """Captions that stand behind a prompt of other captions; the rest are plain."""
    same_image_share: float = Field(default=0.5, ge=0, le=1)
    """Of a prompt's items: other captions of the same image, as long as there are any; the rest are of any other image."""
    words: PromptConfig | None = None
    """Prompts of words, as SITTA makes them: content words of the captions that would stand there, in random order."""
    words_share: float = Field(default=0.0, ge=0, le=1)
    """Of the prompted captions, those behind `words`."""

    @model_validator(mode="after")
    def _check_words(self) -> Self:
        if (self.words is not None) != (self.words_share > 0):
            raise ValueError("words and words_share go together: one says which prompts, the other how many")
        if self.words is not None and self.words.max_tokens > self.prompt.max_tokens:
            raise ValueError("words.max_tokens is more than prompt.max_tokens, by which the model's places are counted")
        return self


class CaptionTable:
    """Captions by number, with those of their image. Raises DataError where no caption has another beside it."""

    def __init__(self, captions: Mapping[str, Sequence[str]]):
        rows = [(number, image, text) for image, texts in captions.items() for number, text in enumerate(texts)]
        if len(rows) < 2:
            raise DataError(f"expected two captions or more, found {len(rows)}: a prompt is made of others")
        self.texts = [text for _, _, text in rows]
        self.images = [image for _, image, _ in rows]
        self.keys = [f"{image}#{number}" for number, image, _ in rows]
        self._of_image = captions

    def __len__(self) -> int:
        return len(self.texts)

    def draw_others(self, index: int, num: int, generator: Random, *, same_image_share: float) -> list[str]:
        """`num` other captions in random order, none of them equal to this one; fewer where there are not as many."""
        text, image = self.texts[index], self.images[index]
        own = [other for other in self._of_image[image] if other != text]
        generator.shuffle(own)
        chosen: list[str] = []
        for _ in range(num):
            if own and generator.random() < same_image_share:
                chosen.append(own.pop())
            elif len(own) < len(self) - 1:
                other = generator.randrange(len(self))
                if self.images[other] != image and self.texts[other] != text:
                    chosen.append(self.texts[other])
        return chosen


def collate_prompted(
    table: CaptionTable, indices: Sequence[int], lm: CaptionLM, config: PromptedConfig, *, generators: Sequence[Random]
) -> dict[str, Any]:
    """`prompt` and `prompt_is_real` (NL, padded on the left), `token` (NT, padded on the right), `length` (N), `key`."""
    prompts, rows = [], []
    for index, generator in zip(indices, generators, strict=True):
        items, prompt = draw_items(table, index, config, generator)
        prompts.append(encode_prompt(items, prompt, lm.encode_prompt) if items else lm.encode_prompt(""))
        rows.append(lm.encode_caption(table.texts[index], max_tokens=config.max_tokens))
    batch = pad_prompts(prompts, lm.pad)
    token_NT, length_N = lm.pad_captions(rows)
    keys = [table.keys[index] for index in indices]
    return {"prompt": batch.token_NL, "prompt_is_real": batch.is_real_NL, "token": token_NT, "length": length_N, "key": keys}


def draw_items(
    table: CaptionTable, index: int, config: PromptedConfig, generator: Random
) -> tuple[list[str], PromptConfig]:
    """What stands before a caption, in its order, and the prompt it stands in; no items for a plain caption."""
    if generator.random() >= config.prompted_share:
        return [], config.prompt
    num = config.prompt.pool or config.prompt.num_items
    drawn = table.draw_others(index, num, generator, same_image_share=config.same_image_share)
    if config.words is None or generator.random() >= config.words_share:
        return arrange_items(drawn, config.prompt, generator), config.prompt
    words = list(dict.fromkeys(word for text in drawn for word in content_words(text)))
    generator.shuffle(words)
    return words[: config.words.num_items], config.words


class PromptedBatches:
    """This rank's endless batches; an epoch is a permutation by (seed, epoch), what is drawn depends on (seed, epoch, key).

    `resume` is what `PositionTracker.state()` gave on this rank. Raises CheckpointError for a `resume` of another order.
    """

    def __init__(
        self, table: CaptionTable, lm: CaptionLM, config: PromptedConfig, *, seed: int, rank: int, world_size: int, resume: Any
    ):
        self.table, self.lm, self.config, self.seed, self.rank, self.world_size = table, lm, config, seed, rank, world_size
        self.order = fingerprint((seed, rank, world_size, config.batch_size, table.keys))
        self.resume = resume or {"order": self.order, "workers": {}}
        if self.resume["order"] not in (None, self.order):
            raise CheckpointError(
                "the checkpoint's place in the captions belongs to another order: expected the same seed, batch size, "
                "number of processes and captions as when it was saved; restore them, or start another run.folder"
            )
        if len(table) < world_size:
            raise DataError(f"{len(table)} captions are too few for {world_size} processes")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        picked: list[tuple[int, Random]] = []
        for index, epoch, offset in self._walk():
            picked.append((index, Random(f"{self.seed}/{epoch}/{self.table.keys[index]}")))
            if len(picked) == self.config.batch_size:
                indices, generators = zip(*picked, strict=True)
                batch = collate_prompted(self.table, indices, self.lm, self.config, generators=generators)
                yield {**batch, "position": self._position(epoch, offset)}
                picked = []

    def _walk(self) -> Iterator[tuple[int, int, int]]:
        """Numbers of captions without end, each with the epoch and how many of it have been used then."""
        start = self.resume["workers"].get("0", {"epoch": 0, "offset": 0})
        num_done = start["offset"]
        for epoch in count(start["epoch"]):
            order_N = np.random.default_rng((self.seed, epoch)).permutation(len(self.table))
            for offset, index in enumerate(order_N[self.rank :: self.world_size][num_done:], num_done + 1):
                yield int(index), epoch, offset
            num_done = 0

    def _position(self, epoch: int, offset: int) -> dict[str, Any]:
        stands = {"epoch": epoch, "group": 0, "offset": offset}
        return {"worker": 0, "num_workers": 1, "order": self.order, **stands, "num_dropped": {}, "worst": None}
