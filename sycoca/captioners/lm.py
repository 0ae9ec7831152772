"""One interface over transformers language models: prompts in, captions and their log-probabilities out.

A model may be causal (the prompt is what the caption goes on from) or seq2seq (the encoder reads the prompt). What an image
has to say enters as words of the prompt, as a prefix of vectors before it, or through cross-attention (adapters.py).
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.captioners.adapters import CrossAttentionAdapters, Memory
from sycoca.captioners.lm_architectures import Architecture, Ends, Step
from sycoca.captioners.prompt import PromptBatch
from sycoca.data.tokenizer import pad_rows
from sycoca.generation import Generated, GenerationConfig, decode
from sycoca.types import ConfigError

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of a token that is a part of a character only."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What an image adds to its prompt."""

    prefix_NQD: Tensor | None = None
    """Vectors right before the prompt, as wide as the model's input embeddings (prefix.py)."""
    memory_NMF: Tensor | None = None
    """Patch states that the cross-attention adapters read."""


NOTHING = Condition()


class CaptionLM(nn.Module):
    """A language model with its tokenizer; frozen, and in evaluation mode, until something is told to train.

    `adapters` is None until `add_adapters`. Stop tokens other than eos count as eos: the probability of ending is the sum of
    theirs, and none of them is ever written.
    """

    def __init__(self, architecture: Architecture, tokenizer: Any, *, pad: int, stops: Sequence[int] = ()):
        super().__init__()
        self.architecture, self.tokenizer, self.pad = architecture, tokenizer, pad
        self.model: nn.Module = architecture.model
        self.eos: int = tokenizer.eos_token_id
        self.ends = Ends(self.eos, tuple(sorted(set(stops) - {self.eos})))
        self.adapters: CrossAttentionAdapters | None = None
        self.model.requires_grad_(False)
        self.register_state_dict_post_hook(_leave_out_tied)
        self.register_load_state_dict_pre_hook(_put_tied_back)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Of an input embedding, and so of a prefix's vectors."""
        return self.input_embeddings().shape[1]

    def train(self, mode: bool = True) -> "CaptionLM":
        """A frozen model stays in evaluation mode, without dropout, while adapters train."""
        super().train(mode)
        self.model.train(mode and any(parameter.requires_grad for parameter in self.model.parameters()))
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def add_adapters(self, memory_width: int, *, reduction: int = 4) -> CrossAttentionAdapters:
        """New cross-attention in every layer, reading memory of this width; only it trains. Raises ConfigError."""
        if self.adapters is not None:
            raise ConfigError("this language model has cross-attention adapters already; load it again to add others")
        adapters = CrossAttentionAdapters(self.model, memory_width, reduction=reduction)
        self.adapters = adapters.to(self.device).train(self.training)
        return self.adapters

    # Vocabulary

    def input_embeddings(self) -> Tensor:
        """VD, detached; V may be more than the tokenizer knows (rows that only fill the matrix up)."""
        return self.architecture.embedding().weight.detach()

    def token_texts(self) -> list[str]:
        """The text of each of the V tokens: decoded, without markers and surrounding blanks.

        Empty for special tokens, for pieces of a character, for blanks, and for rows that the tokenizer does not know.
        """
        num_known, special = len(self.tokenizer), set(self.tokenizer.all_special_ids)
        kept = [token for token in range(min(num_known, self.input_embeddings().shape[0])) if token not in special]
        texts = [""] * self.input_embeddings().shape[0]
        for token, text in zip(kept, self.tokenizer.batch_decode([[token] for token in kept]), strict=True):
            texts[token] = "" if _UNREADABLE in text else text.strip()
        return texts

    # Text to ids and back

    def encode_prompt(self, text: str) -> list[int]:
        """Ids with the special tokens that the model was trained with; never empty, and open at the end in a causal model."""
        ids = list(self.tokenizer.encode(text))
        if not self.architecture.pads_right and len(ids) > 1 and ids[-1] == self.eos:
            ids.pop()
        return ids or [self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id]

    def encode_caption(self, text: str, *, max_tokens: int) -> list[int]:
        """Ids of a caption up to its first stop token, then eos; at most `max_tokens`, of which eos is always the last."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        ends = {self.eos, *self.ends.others}
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return [*ids[: min(length, max_tokens - 1)], self.eos]

    def pad_captions(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """`(token_NT, length_N)`, padded on the right."""
        return pad_rows(rows, max(map(len, rows), default=0), self.pad)

    def decode_texts(self, generated: Generated) -> list[list[str]]:
        """The J captions of each row."""
        return [[self.decode_caption(row) for row in rows] for rows in generated.token_NJT.tolist()]

    def decode_caption(self, ids: Iterable[int]) -> str:
        """The text before eos, blanks at both ends left out."""
        kept: list[int] = []
        for token in ids:
            if token == self.eos:
                break
            kept.append(token)
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    # Writing and rating

    @torch.no_grad()
    def generate(
        self, prompt: PromptBatch, config: GenerationConfig, condition: Condition = NOTHING, *,
        generator: torch.Generator | None = None,
    ) -> Generated:  # fmt: skip
        """Captions of every prompt. Raises ConfigError where prompt and caption would be longer than the model can read."""
        step, start_NT = self.start(prompt, condition, max_tokens=config.max_tokens)
        return decode(step, start_NT, config, eos=self.eos, generator=generator)

    def start(self, prompt: PromptBatch, condition: Condition = NOTHING, *, max_tokens: int) -> tuple[Step, Tensor]:
        """The step function of one decoding run, and the prompt to give to `generation.decode` with it."""
        prompt = prompt.to(self.device)
        embedding_NLD, is_real_NL = self._embed(prompt, condition)
        self.architecture.check_length(embedding_NLD.shape[1], max_tokens)
        memory = self._project(condition)
        return self.architecture.begin(prompt.token_NL, embedding_NLD, is_real_NL, ends=self.ends, memory=memory)

    def log_probs(self, prompt: PromptBatch, token_NT: Tensor, length_N: Tensor, condition: Condition = NOTHING) -> Tensor:
        """NT float32, in nats, with gradient: of each token of the captions after its prompt and the tokens before it.

        Captions are padded on the right and end in eos (or in none, where they were cut); 0 behind a caption's end.
        """
        prompt, token_NT = prompt.to(self.device), token_NT.to(self.device)
        embedding_NLD, is_real_NL = self._embed(prompt, condition)
        self.architecture.check_length(embedding_NLD.shape[1], token_NT.shape[1])
        is_caption_NT = torch.arange(token_NT.shape[1], device=self.device) < length_N.to(self.device)[:, None]
        memory = self._project(condition)
        with memory.attended() if memory is not None else nullcontext():
            logit_NTV = self.architecture.caption_logits(embedding_NLD, is_real_NL, token_NT, is_caption_NT)
        loss_NT = F.cross_entropy(self.ends.merge(logit_NTV).mT, token_NT, reduction="none")
        return -loss_NT.masked_fill(~is_caption_NT, 0.0)

    def _embed(self, prompt: PromptBatch, condition: Condition) -> tuple[Tensor, Tensor]:
        """Prefix and prompt side by side, padding moved to the left (seq2seq: to the right), where no position counts it."""
        embedding_NLD = self.architecture.embedding()(prompt.token_NL)
        is_real_NL = prompt.is_real_NL
        if condition.prefix_NQD is not None:
            prefix_NQD = condition.prefix_NQD.to(embedding_NLD)
            embedding_NLD = torch.cat([prefix_NQD, embedding_NLD], dim=1)
            is_real_NL = torch.cat([is_real_NL.new_ones(prefix_NQD.shape[:2]), is_real_NL], dim=1)
        assert embedding_NLD.shape[1] > 0 and bool(is_real_NL.any(1).all()), "every row needs a prompt, a prefix, or both"
        place_NL = is_real_NL.byte().argsort(dim=1, stable=True, descending=self.architecture.pads_right)
        embedding_NLD = embedding_NLD.gather(1, place_NL[..., None].expand_as(embedding_NLD))
        return embedding_NLD, is_real_NL.gather(1, place_NL)

    def _project(self, condition: Condition) -> Memory | None:
        assert (self.adapters is None) == (condition.memory_NMF is None), "memory and cross-attention adapters go together"
        if self.adapters is None or condition.memory_NMF is None:
            return None
        return self.adapters.project(condition.memory_NMF.to(self.device))


def _tied_names(lm: CaptionLM) -> dict[str, str]:
    """Names of weights that stand for another of the model's (an output layer tied to the embedding), and that one's."""
    first: dict[nn.Parameter, str] = {}
    every = lm.named_parameters(remove_duplicate=False)
    return {name: first[weight] for name, weight in every if first.setdefault(weight, name) != name}


def _leave_out_tied(lm: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Each weight once: safetensors refuses tensors that share their memory."""
    assert isinstance(lm, CaptionLM), "the hook of a language model"
    for name in _tied_names(lm):
        state.pop(prefix + name, None)


def _put_tied_back(lm: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    assert isinstance(lm, CaptionLM), "the hook of a language model"
    for name, source in _tied_names(lm).items():
        if prefix + source in state:
            state.setdefault(prefix + name, state[prefix + source])
