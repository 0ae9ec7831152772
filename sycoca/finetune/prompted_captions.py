"""Captions as a language model learns them without images: each behind a prompt of other captions, or behind none."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.prompt import PromptConfig, arrange_items, encode_prompt, pad_prompts
from sycoca.captioners.words import content_words
from sycoca.config import Config
from sycoca.data.decode import CaptionConfig
from sycoca.finetune.numbered import NumberedBatches, Order
from sycoca.types import DataError


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
    own_share: float = Field(default=0.0, ge=0, le=1)
    """Of the prompts of captions, those in which the caption itself stands in place of another. Pretrained language models have
    read repetitions and can copy; one that never met its caption in a prompt cannot."""
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
        if config.own_share and generator.random() < config.own_share:  # no draw without it: batches stay as they were
            place = generator.randrange(max(1, len(drawn)))
            drawn[place : place + 1] = [table.texts[index]]
        return arrange_items(drawn, config.prompt, generator), config.prompt
    words = list(dict.fromkeys(word for text in drawn for word in content_words(text)))
    generator.shuffle(words)
    return words[: config.words.num_items], config.words


class PromptedBatches(NumberedBatches):
    """This rank's endless batches of captions behind prompts, in the order of `numbered.py`. Raises as that does."""

    def __init__(self, table: CaptionTable, lm: CaptionLM, config: PromptedConfig, order: Order, *, resume: Any):
        def collate(indices: Sequence[int], generators: Sequence[Random]) -> dict[str, Any]:
            return collate_prompted(table, indices, lm, config, generators=generators)

        super().__init__(table.keys, collate, order, resume=resume)
