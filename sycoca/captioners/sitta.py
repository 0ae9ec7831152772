"""SITTA (arXiv 2307.05591v1): a linear map takes the image to a language model's vocabulary, and the nearest words prompt it.

No gradient, and nothing of encoder or language model is changed: the words stand in several prompts, in rank order and in
random orders, and of the captions that they lead to the encoder chooses the best.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from sycoca.captioners.alignment import AlignmentConfig
from sycoca.captioners.candidates import Choice, build_scorer, choose, write_candidates
from sycoca.captioners.captioner import Written, load_its_encoder, read_captioner, save_captioner
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner, load_aligner
from sycoca.captioners.lm_loading import LMConfig
from sycoca.captioners.prompt import PromptConfig, arrange_items, encode_prompt
from sycoca.captioners.sitta_maps import TokenMapConfig
from sycoca.captioners.token_vocabulary import TokenVocabulary
from sycoca.config import Config, parse_config
from sycoca.generation import GenerationConfig
from sycoca.types import DataError

_TOKEN_MAP, _CHOOSER = "token_map.safetensors", "aligner.safetensors"


class SittaConfig(Config):
    """How words are found, and captions made of them; the defaults are the paper's for COCO."""

    type: Literal["sitta"] = "sitta"
    lm: LMConfig
    token_map: TokenMapConfig = TokenMapConfig()
    prompt: PromptConfig = PromptConfig(template="sitta", num_items=8)
    """In rank order; `num_prompts` says how many more there are."""
    num_prompts: int = Field(default=40, ge=1)
    """The first in rank order, the others in random orders."""
    generation: GenerationConfig = GenerationConfig()
    choose_by: Choice = "CLIP-S"
    alignment: AlignmentConfig = AlignmentConfig()
    """Of images and texts, for `choose_by: aCLIP-S`."""
    seed: int = 0
    """Of the random orders."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt.order != "rank" or self.prompt.num_items < 1:
            raise ValueError(f"prompt: expected order rank and num_items of 1 or more, found {self.prompt.order}, "
                             f"{self.prompt.num_items}; num_prompts makes the random orders")  # fmt: skip
        return self


class Sitta:
    """Retrieves words. `chooser` is the aligner of images and texts that aCLIP-S needs; None where another score chooses."""

    kind: ClassVar[str] = "sitta"

    def __init__(
        self, encoder: FrozenEncoder, vocabulary: TokenVocabulary, token_map: LinearAligner, chooser: LinearAligner | None,
        config: SittaConfig,
    ):  # fmt: skip
        if (config.choose_by == "aCLIP-S") != (chooser is not None):
            raise DataError(f"captioner.choose_by is {config.choose_by}: aCLIP-S alone needs an aligner of images and texts")
        token_map.check_spaces(source=encoder.fingerprint, target=vocabulary.fingerprint)
        self.encoder, self.vocabulary, self.lm = encoder, vocabulary, vocabulary.lm
        self.token_map, self.chooser, self.config = token_map, chooser, config
        self._scorer = build_scorer(config.choose_by, encoder, chooser)
        self.retrieve(torch.zeros(1, encoder.embed_width))  # so that a vocabulary with too few words is refused at once

    def explain(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[Written]:
        """A caption an image, with the words it was made of."""
        return self.write(self.encoder.encode_image(image_BCHW), keys)

    def caption(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[str]:
        """A caption an image."""
        return [written.caption for written in self.explain(image_BCHW, keys)]

    @torch.no_grad()
    def write(self, image_BE: Tensor, keys: Sequence[str]) -> list[Written]:
        """The same of raw image embeddings; keys seed the random orders."""
        words = self.retrieve(image_BE)
        prompts = [self._make_prompts(of_image, key) for of_image, key in zip(words, keys, strict=True)]
        candidates = write_candidates(self.lm, prompts, self.config.generation, seed=self.config.seed)
        return choose(candidates, words, image_BE.to(self.encoder.device), self._scorer)

    def retrieve(self, image_BE: Tensor) -> list[list[str]]:
        """The words nearest to each image, best first."""
        return self.vocabulary.search(self.token_map.apply(image_BE), self.config.prompt.num_items)

    def _make_prompts(self, words: Sequence[str], key: str) -> list[list[int]]:
        permuted = self.config.prompt.model_copy(update={"order": "permute"})
        generator = Random(f"{self.config.seed}/{key}")
        orders = [list(words), *(arrange_items(words, permuted, generator) for _ in range(self.config.num_prompts - 1))]
        return [encode_prompt(order, self.config.prompt, self.lm.encode_prompt) for order in orders]

    def save(self, folder: Path) -> None:
        """Write facts and maps."""
        save_captioner(self, folder, {"config": self.config.model_dump(mode="json"), "words": self.vocabulary.allowed})
        self.token_map.save(folder / _TOKEN_MAP)
        if self.chooser is not None:
            self.chooser.save(folder / _CHOOSER)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """What `save` wrote. Raises DataError, CheckpointError, ConfigError."""
        facts = read_captioner(folder)
        config = parse_config(SittaConfig, facts["config"], source=str(folder))
        encoder, lm = load_its_encoder(folder, device), config.lm.load(device)
        vocabulary = TokenVocabulary(lm, allowed=facts["words"], kinds=config.token_map.token_transform)
        chooser = load_aligner(folder / _CHOOSER) if config.choose_by == "aCLIP-S" else None
        return cls(encoder, vocabulary, load_aligner(folder / _TOKEN_MAP), chooser, config)
