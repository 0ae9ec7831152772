"""CgT-GAN (arXiv:2308.12045): an image's embedding becomes a prefix of vectors, from which a causal language model writes.

Prefix and language model are trained together, without pairs (finetune/cgtgan.py), so both are saved, with what was fitted
on the images' embeddings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sycoca.captioners.candidates import Candidates, choose
from sycoca.captioners.captioner import Written, load_its_encoder, read_captioner, save_captioner
from sycoca.captioners.encoder import FrozenEncoder
from sycoca.captioners.lm import CaptionLM, Condition
from sycoca.captioners.lm_loading import LMConfig, load_lm
from sycoca.captioners.prefix import NUM_PREFIX, PrefixMapper
from sycoca.captioners.prompt import PromptBatch, pad_prompts
from sycoca.captioners.storage import load_tensors, save_tensors
from sycoca.captioners.transform import EmbeddingTransform, Kind, from_tensors
from sycoca.config import Config, parse_config
from sycoca.generation import Generated, GenerationConfig
from sycoca.pretrained import load_weights
from sycoca.types import ConfigError

_LM, _PREFIX = "lm", "prefix.safetensors"
_KIND = "prefix mapper"
_IMAGE = "image_transform."


class CgTGanConfig(Config):
    """What is built and how it writes; the defaults are the paper's."""

    type: Literal["cgtgan"] = "cgtgan"
    lm: LMConfig
    """A causal one, which training starts from."""
    num_prefix: int = Field(default=NUM_PREFIX, ge=1)
    transform: list[Kind] = []
    """Of embeddings before the prefix, fitted on images and on sentences apart, without pairs. A dual encoder keeps the two in
    different places (arXiv:2203.02053), and what was learnt from sentences alone is lost on images: `[zscore]` gives both the
    same mean and deviations. The paper has none."""
    generation: GenerationConfig = GenerationConfig(method="beam", num_beams=5, num_return=5, max_tokens=20)


class Generator(nn.Module):
    """Embedding to prefix to caption; all of it trains. Raises ConfigError for a seq2seq language model."""

    def __init__(self, lm: CaptionLM, embed_width: int, *, num_prefix: int = NUM_PREFIX):
        super().__init__()
        config: Any = lm.model.config
        if config.is_encoder_decoder:
            raise ConfigError("captioner.lm: a prefix needs a causal language model, and this one is seq2seq; choose another")
        self.lm, self.prefix = lm, PrefixMapper(embed_width, lm.width, num_vectors=num_prefix).to(lm.device)
        lm.model.requires_grad_(True)

    def write(self, embedding_NE: Tensor, config: GenerationConfig, *, generator: torch.Generator | None = None) -> Generated:
        """Captions of transformed embeddings, without gradient."""
        with torch.no_grad():
            condition = Condition(prefix_NQD=self.prefix(embedding_NE.to(self.lm.device)))
            return self.lm.generate(self._no_prompt(embedding_NE), config, condition, generator=generator)

    def log_probs(self, embedding_NE: Tensor, token_NT: Tensor, length_N: Tensor) -> Tensor:
        """NT: as `CaptionLM.log_probs`, with gradient."""
        condition = Condition(prefix_NQD=self.prefix(embedding_NE.to(self.lm.device)))
        return self.lm.log_probs(self._no_prompt(embedding_NE), token_NT, length_N, condition)

    def _no_prompt(self, embedding_NE: Tensor) -> PromptBatch:
        return pad_prompts([[] for _ in embedding_NE], self.lm.pad)


class CgTGan:
    """Writes from an image's embedding alone."""

    kind: ClassVar[str] = "cgtgan"

    def __init__(
        self, encoder: FrozenEncoder, generator: Generator, config: CgTGanConfig, image_transform: EmbeddingTransform
    ):
        self.encoder, self.generator, self.config, self.image_transform = encoder, generator, config, image_transform

    def explain(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[Written]:
        """A caption an image, with all beams and their scores; nothing is retrieved."""
        return self.write(self.encoder.encode_image(image_BCHW))

    def caption(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[str]:
        """A caption an image."""
        return [written.caption for written in self.explain(image_BCHW, keys)]

    def write(self, image_BE: Tensor) -> list[Written]:
        """The same from raw image embeddings."""
        written = self.generator.write(self.image_transform(image_BE), self.config.generation)
        candidates = Candidates(self.generator.lm.decode_texts(written), written.score_NJ.float().cpu())
        return choose(candidates, [[] for _ in image_BE], image_BE, None)

    def save(self, folder: Path) -> None:
        """Write facts, the language model as transformers saves it, the prefix, and the images' transform."""
        lm: Any = self.generator.lm
        lm.model.save_pretrained(folder / _LM)
        lm.tokenizer.save_pretrained(str(folder / _LM))
        tensors = self.generator.prefix.state_dict() | self.image_transform.tensors(_IMAGE)
        save_tensors(folder / _PREFIX, tensors, {"kind": _KIND, "image_kinds": self.image_transform.kinds})
        save_captioner(self, folder, {"config": self.config.model_dump(mode="json")})

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """What `save` wrote. Raises DataError, CheckpointError, ConfigError."""
        config = parse_config(CgTGanConfig, read_captioner(folder)["config"], source=str(folder))
        encoder = load_its_encoder(folder, device)
        lm = load_lm(folder / _LM, device=device, stops=config.lm.stops)
        generator = Generator(lm, encoder.embed_width, num_prefix=config.num_prefix).requires_grad_(False).eval()
        tensors, facts = load_tensors(folder / _PREFIX, kind=_KIND)
        prefix = {name: tensor for name, tensor in tensors.items() if not name.startswith(_IMAGE)}
        load_weights(generator.prefix, prefix, source=str(folder))
        return cls(encoder, generator, config, from_tensors(facts.get("image_kinds", []), tensors, _IMAGE))
