"""SmallCap (arXiv:2209.15323): a frozen language model learns, in narrow cross-attention, to look at an image's patches.

Captions of similar images stand in its prompt. They come from a datastore that can be changed for another without training:
for another domain `swap`, or `tools/build_datastore.py swap CAPTIONER/datastore`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import Self

from sycoca.captioners.adapters import CrossAttentionAdapters
from sycoca.captioners.alignment import fit_space
from sycoca.captioners.candidates import Candidates, choose
from sycoca.captioners.captioner import Written, load_its_encoder, read_captioner, save_captioner
from sycoca.captioners.datastore_files import rows_of_store
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import FrozenEncoder, hash_weights
from sycoca.captioners.lm import CaptionLM, Condition
from sycoca.captioners.lm_loading import LMConfig
from sycoca.captioners.prompt import PromptConfig, encode_prompt, pad_prompts
from sycoca.captioners.retriever import CaptionRetriever, RetrievalConfig, build_retriever
from sycoca.captioners.storage import load_tensors, save_tensors
from sycoca.captioners.text_rows import TextRows
from sycoca.config import parse_config
from sycoca.generation import GenerationConfig
from sycoca.pretrained import load_weights
from sycoca.types import DataError

_ADAPTERS = "adapters.safetensors"
_KIND = "cross-attention adapters"


class SmallCapConfig(RetrievalConfig):
    """What is built and how it writes; the defaults are the paper's."""

    type: Literal["smallcap"] = "smallcap"
    lm: LMConfig
    reduction: int = Field(default=4, ge=1)
    """The adapters' width is the language model's divided by this; 4 trains 7 M parameters of GPT-2 base."""
    space: Literal["raw", "centred", "aligned"] = "raw"
    """Where similar captions are sought: l2 (the paper), also centred, or through ReCap's map."""
    prompt: PromptConfig = PromptConfig(template="smallcap", num_items=4)
    generation: GenerationConfig = GenerationConfig(method="beam", num_beams=3, num_return=3, max_tokens=25)

    @field_validator("prompt")
    @classmethod
    def _check_order(cls, prompt: PromptConfig) -> PromptConfig:
        if prompt.order != "rank":
            raise ValueError("captions are written from the best rows, in their order; to draw them in training set data.pool")
        return prompt


class SmallCap:
    """Retrieves captions and writes from them and from the image's patches. Only `adapters` was trained."""

    kind: ClassVar[str] = "smallcap"

    def __init__(self, lm: CaptionLM, retriever: CaptionRetriever, config: SmallCapConfig):
        self.encoder, self.lm, self.retriever, self.config = retriever.encoder, lm, retriever, config
        self.adapters: CrossAttentionAdapters = lm.add_adapters(self.encoder.patch_width, reduction=config.reduction)

    def explain(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[Written]:
        """A caption an image, with the captions that stood in its prompt, and all beams with their scores."""
        return self.write(self.encoder.encode_image(image_BCHW), self.encoder.encode_patches(image_BCHW), keys)

    def caption(self, image_BCHW: Tensor, keys: Sequence[str]) -> list[str]:
        """A caption an image."""
        return [written.caption for written in self.explain(image_BCHW, keys)]

    @torch.no_grad()
    def write(self, image_BE: Tensor, memory_BMF: Tensor, keys: Sequence[str]) -> list[Written]:
        """The same from raw image embeddings and patch states."""
        items = self.retriever.datastore.texts(self.retriever.search(image_BE, keys))
        prompt = pad_prompts([encode_prompt(texts, self.config.prompt, self.lm.encode_prompt) for texts in items], self.lm.pad)
        written = self.lm.generate(prompt, self.config.generation, Condition(memory_NMF=memory_BMF))
        candidates = Candidates(self.lm.decode_texts(written), written.score_NJ.float().cpu())
        return choose(candidates, items, image_BE, None)

    def swap(self, contents: TextRows) -> None:
        """Put other captions of the same encoder in place of all: another domain, and no weight changes. Raises DataError."""
        self.retriever.datastore.swap(contents)

    def save(self, folder: Path) -> None:
        """Write facts, adapters, aligner and datastore; encoder and language model stay where they are."""
        facts = {"config": self.config.model_dump(mode="json"), "lm_fingerprint": hash_weights(self.lm.model, self.lm.ends)}
        save_captioner(self, folder, facts)
        save_tensors(folder / _ADAPTERS, self.adapters.state_dict(), {"kind": _KIND})
        self.retriever.save(folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Self:
        """What `save` wrote. Raises DataError for another language model of that name, CheckpointError, ConfigError."""
        facts = read_captioner(folder)
        config = parse_config(SmallCapConfig, facts["config"], source=str(folder))
        encoder, lm = load_its_encoder(folder, device), config.lm.load(device)
        found = hash_weights(lm.model, lm.ends)
        if found != facts["lm_fingerprint"]:
            raise DataError(
                f"{folder}: trained on {config.lm.name} as it was then ({facts['lm_fingerprint']}), and there is another now "
                f"({found}): language model and adapters do not belong together. Fit the captioner again"
            )
        captioner = cls(lm, CaptionRetriever.load(folder, encoder, num=config.prompt.num_items), config)
        load_weights(captioner.adapters, load_tensors(folder / _ADAPTERS, kind=_KIND)[0], source=str(folder))
        return captioner


def build_smallcap(encoder: FrozenEncoder, lm: CaptionLM, train: EmbeddingStore, config: SmallCapConfig) -> SmallCap:
    """A captioner over the training captions whose adapters are new. Raises DataError, ConfigError."""
    aligner = fit_space(train, config.space, config.alignment)
    retriever = build_retriever(encoder, rows_of_store(train), aligner, config, num=config.prompt.num_items)
    return SmallCap(lm, retriever, config)
