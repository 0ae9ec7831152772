"""ReCap (arXiv 2307.05591v2): a linear map takes the image to captions like its own, and a frozen language model reads them.

The map is solved in closed form on training pairs, l2-normalised and centred; its neighbours among the training captions, in a
prompt, are all that the language model knows of the image.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from sycoca.captioners.alignment import fit_space
from sycoca.captioners.candidates import Choice, build_scorer, choose, write_candidates
from sycoca.captioners.captioner import Written, load_its_encoder, read_captioner, save_captioner
from sycoca.captioners.datastore_files import rows_of_store
from sycoca.captioners.embeddings import Pairs
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.lm_loading import LMConfig
from sycoca.captioners.prompt import PromptConfig, arrange_items, encode_prompt
from sycoca.captioners.retriever import CaptionRetriever, RetrievalConfig, build_retriever
from sycoca.config import parse_config
from sycoca.generation import GenerationConfig
from sycoca.types import DataError, image_of


class ReCapConfig(RetrievalConfig):
    """How an image finds captions, and what is done with them; the defaults are the paper's."""

    type: Literal["recap"] = "recap"
    lm: LMConfig
    space: Literal["aligned", "centred", "raw", "shuffled", "random"] = "aligned"
    """Where neighbours are sought. All but `aligned` are controls: l2 and centred only, l2 only, a map of shuffled pairs, and
    captions that are drawn instead of found."""
    prompt: PromptConfig = PromptConfig(template="recap", num_items=4)
    generation: GenerationConfig = GenerationConfig()
    choose_by: Choice = "likelihood"
    """Among `generation.num_return` captions."""
    seed: int = 0
    """Of random captions, orders and samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choose_by != "likelihood" and self.generation.num_return < 2:
            raise ValueError(f"choose_by is {self.choose_by}, and there is one candidate; raise generation.num_return")
        return self

    @property
    def num_found(self) -> int:
        """Captions an image, from which the prompt takes its own."""
        return self.prompt.pool or self.prompt.num_items


class ReCap:
    """Retrieves captions and has the language model read them."""

    kind: ClassVar[str] = "recap"

    def __init__(self, lm: CaptionLM, retriever: CaptionRetriever, config: ReCapConfig):
        self.encoder, self.lm, self.retriever, self.config = retriever.encoder, lm, retriever, config
        self._scorer = build_scorer(config.choose_by, retriever.encoder, retriever.aligner)

    def explain(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[Written]:
        """A caption an image, with the captions it was made of."""
        return self.write(self.encoder.encode_image(image_BCHW), keys)

    def caption(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[str]:
        """A caption an image."""
        return [written.caption for written in self.explain(image_BCHW, keys)]

    def write(self, image_BE: Tensor, keys: Sequence[str]) -> list[Written]:
        """The same of raw image embeddings."""
        config = self.config
        generators = [Random(f"{config.seed}/{key}") for key in keys]
        items = [
            arrange_items(texts, config.prompt, generator)
            for texts, generator in zip(self.retrieve(image_BE, keys), generators, strict=True)
        ]
        prompts = [[encode_prompt(of_image, config.prompt, self.lm.encode_prompt)] for of_image in items]
        candidates = write_candidates(self.lm, prompts, config.generation, seed=config.seed)
        return choose(candidates, items, image_BE.to(self.encoder.device), self._scorer)

    def retrieve(self, image_BE: Tensor, keys: Sequence[str]) -> list[list[str]]:
        """The texts nearest to each image, best first; none of the image itself. Raises DataError where too few are left."""
        if self.config.space == "random":
            return [self._draw(key) for key in keys]
        return self.retriever.datastore.texts(self.retriever.search(image_BE, keys))

    def _draw(self, key: str) -> list[str]:
        """Texts of any other image."""
        num, rows = self.config.num_found, self.retriever.datastore.rows
        texts = [row.text for row in rows if not key or row.source != image_of(key)]
        if len(texts) < num:
            raise DataError(f"{key}: {num} captions asked, and the datastore has {len(texts)} of other images")
        return Random(f"random/{self.config.seed}/{key}").sample(texts, num)

    def save(self, folder: Path) -> None:
        """Write facts, aligner and datastore."""
        save_captioner(self, folder, {"config": self.config.model_dump(mode="json")})
        self.retriever.save(folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """What `save` wrote. Raises DataError, CheckpointError, ConfigError."""
        config = parse_config(ReCapConfig, read_captioner(folder)["config"], source=str(folder))
        retriever = CaptionRetriever.load(folder, load_its_encoder(folder, device), num=config.num_found)
        return cls(config.lm.load(device), retriever, config)


def fit_its_space(train: Pairs, config: ReCapConfig) -> LinearAligner:
    """The aligner of the space that the configuration names. Raises DataError without captions."""
    return fit_space(train, "aligned" if config.space == "random" else config.space, config.alignment)


def build_recap(
    encoder: FrozenEncoder, lm: CaptionLM, train: Pairs, aligner: LinearAligner, config: ReCapConfig
) -> ReCap:
    """A captioner over the training captions. Raises DataError for captions of a held-out split, or too few of them."""
    retriever = build_retriever(encoder, rows_of_store(train), aligner, config, num=config.num_found)
    return ReCap(lm, retriever, config)
