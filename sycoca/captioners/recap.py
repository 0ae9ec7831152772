"""ReCap (arXiv 2307.05591v2): a linear map takes the image to captions like its own, and a frozen language model reads them.

The map is solved in closed form on training pairs, l2-normalised and centred; its neighbours among the training captions, in a
prompt, are all that the language model knows of the image.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from sycoca.captioners.alignment import AlignmentConfig, fit_image_to_text, join_unmapped
from sycoca.captioners.candidates import Choice, build_scorer, choose, write_candidates
from sycoca.captioners.captioner import Written, load_its_encoder, read_captioner, save_captioner
from sycoca.captioners.datastore import Datastore, build_datastore
from sycoca.captioners.datastore_files import load_datastore, rows_of_store, save_datastore
from sycoca.captioners.embeddings import Pairs
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.linear_aligner import LinearAligner, load_aligner
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.lm_loading import LMConfig
from sycoca.captioners.prompt import PromptConfig, arrange_items, encode_prompt
from sycoca.captioners.row_index import EXACT, NUM_PROBES
from sycoca.config import Config, parse_config
from sycoca.generation import GenerationConfig
from sycoca.types import DataError, image_of

_ALIGNER, _DATASTORE = "aligner.safetensors", "datastore"


class ReCapConfig(Config):
    """How an image finds captions, and what is done with them; the defaults are the paper's."""

    type: Literal["recap"] = "recap"
    lm: LMConfig
    space: Literal["aligned", "centred", "raw", "shuffled", "random"] = "aligned"
    """Where neighbours are sought. All but `aligned` are controls: l2 and centred only, l2 only, a map of shuffled pairs, and
    captions that are drawn instead of found."""
    alignment: AlignmentConfig = AlignmentConfig()
    """Of `aligned`, `shuffled` and `random`."""
    prompt: PromptConfig = PromptConfig(template="recap", num_items=4)
    generation: GenerationConfig = GenerationConfig()
    choose_by: Choice = "likelihood"
    """Among `generation.num_return` captions."""
    index: str = EXACT
    """Of FAISS."""
    num_probes: int = Field(default=NUM_PROBES, ge=1)
    seed: int = 0
    """Of random captions, orders and samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choose_by != "likelihood" and self.generation.num_return < 2:
            raise ValueError(f"choose_by is {self.choose_by}, and there is one candidate; raise generation.num_return")
        return self


class ReCap:
    """Retrieves captions through an aligner. The datastore's rows are where the aligner maps to, with unit norm."""

    kind: ClassVar[str] = "recap"

    def __init__(
        self, encoder: FrozenEncoder, lm: CaptionLM, aligner: LinearAligner, datastore: Datastore, config: ReCapConfig
    ):
        aligner.check_spaces(source=encoder.fingerprint, target=encoder.fingerprint)
        datastore.check_aligner(aligner)
        self.num_found = config.prompt.pool or config.prompt.num_items
        if self.num_found > len(datastore):
            raise DataError(
                f"captioner.prompt asks for {self.num_found} captions of a datastore of {len(datastore)}; ask for fewer "
                "(num_items, pool), or add rows"
            )
        self.encoder, self.lm, self.aligner, self.datastore, self.config = encoder, lm, aligner, datastore, config
        self._scorer = build_scorer(config.choose_by, encoder, aligner)

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
        if self.num_found == 0:
            return [[] for _ in keys]
        if self.config.space == "random":
            return [self._draw(key) for key in keys]
        query_NE = F.normalize(self.aligner.apply(image_BE), dim=-1)
        excluded = [[image_of(key)] if key else [] for key in keys]
        return self.datastore.texts(self.datastore.search(query_NE, self.num_found, exclude_sources=excluded).row_NK)

    def _draw(self, key: str) -> list[str]:
        """Texts of any other image."""
        rows = [row.text for row in self.datastore.rows if not key or row.source != image_of(key)]
        if len(rows) < self.num_found:
            raise DataError(f"{key}: {self.num_found} captions asked, and the datastore has {len(rows)} of other images")
        return Random(f"random/{self.config.seed}/{key}").sample(rows, self.num_found)

    def save(self, folder: Path) -> None:
        """Write facts, aligner and datastore."""
        save_captioner(self, folder, {"config": self.config.model_dump(mode="json")})
        self.aligner.save(folder / _ALIGNER)
        save_datastore(self.datastore, folder / _DATASTORE)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """What `save` wrote. Raises DataError, CheckpointError, ConfigError."""
        config = parse_config(ReCapConfig, read_captioner(folder)["config"], source=str(folder))
        encoder, lm = load_its_encoder(folder, device), config.lm.load(device)
        return cls(encoder, lm, load_aligner(folder / _ALIGNER), load_datastore(folder / _DATASTORE), config)


def fit_space(train: Pairs, config: ReCapConfig) -> LinearAligner:
    """The aligner of the space that is named. Raises DataError without captions."""
    match config.space:
        case "raw":
            return join_unmapped(train, ["l2"])
        case "centred":
            return join_unmapped(train, ["l2", "centre"])
        case _:
            return fit_image_to_text(train, config.alignment, is_shuffled=config.space == "shuffled")


def build_recap(
    encoder: FrozenEncoder, lm: CaptionLM, train: Pairs, aligner: LinearAligner, config: ReCapConfig
) -> ReCap:
    """A captioner over the training captions. Raises DataError for captions of a held-out split, or too few of them."""
    transform = aligner.target_transform.then_l2()
    datastore = build_datastore(rows_of_store(train), transform, index=config.index, num_probes=config.num_probes)
    return ReCap(encoder, lm, aligner, datastore, config)
