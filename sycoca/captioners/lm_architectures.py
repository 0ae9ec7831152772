"""The two kinds of transformers language models behind one set of calls, and their decoding steps with a transformers cache."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from sycoca.captioners.adapters import Memory
from sycoca.types import ConfigError

Step = Callable[[Tensor, Tensor | None], Tensor]
"""`generation.NextLogits`, with the state of one decoding run."""


@dataclass(frozen=True)
class Ends:
    """The tokens that end a caption: eos, and others that count as eos."""

    eos: int
    others: tuple[int, ...] = ()

    def merge(self, logit_V: Tensor) -> Tensor:
        """(..., V) float32: eos has the logit of ending by any of them (their probabilities add up); the others have none."""
        logit_V = logit_V.float()
        if not self.others:
            return logit_V
        end_1 = logit_V[..., [self.eos, *self.others]].logsumexp(-1, keepdim=True)
        place_V = torch.arange(logit_V.shape[-1], device=logit_V.device)
        is_other_V = torch.isin(place_V, torch.tensor(self.others, device=logit_V.device))
        return torch.where(place_V == self.eos, end_1, logit_V.masked_fill(is_other_V, -torch.inf))


class Architecture(ABC):
    """How a transformers model is called. Prompts come as embeddings, so that a prefix of vectors may stand before them."""

    pads_right: bool
    """On which side of a prompt padding changes no position."""

    def __init__(self, model: Any, source: str):
        self.model = model
        self._source = source
        self._takes = inspect.signature(model.forward).parameters.keys()
        self._max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        if "attention_mask" not in self._takes:
            raise ConfigError(f"{source}: expected a model that takes an attention mask, without it padding would be read")

    def embedding(self) -> nn.Embedding:
        """The input embeddings."""
        return self.model.get_input_embeddings()

    def check_length(self, num_prompt: int, num_new: int) -> None:
        """Raises ConfigError where a prompt and what is written after it have more places than the model was built for."""
        num = self._num_places(num_prompt, num_new)
        if self._max_positions is not None and num > self._max_positions:
            raise ConfigError(
                f"{self._source} reads {self._max_positions} tokens at most; a prompt of {num_prompt} and {num_new} new ones "
                "are too many: lower prompt.max_tokens or generation.max_tokens"
            )

    @abstractmethod
    def begin(self, token_NL: Tensor, embedding_NLD: Tensor, is_real_NL: Tensor, *, ends: Ends, memory: Memory | None
              ) -> tuple[Step, Tensor]:  # fmt: skip
        """A decoding run: its step, and the prompt that `generation.decode` starts from."""

    @abstractmethod
    def caption_logits(self, embedding_NLD: Tensor, is_real_NL: Tensor, token_NT: Tensor, is_caption_NT: Tensor) -> Tensor:
        """NTV: for each token of the captions, the logits from which it is chosen."""

    @abstractmethod
    def _num_places(self, num_prompt: int, num_new: int) -> int: ...


class CausalArchitecture(Architecture):
    """The prompt is the beginning of what is written; padding goes to its left."""

    pads_right = False

    def begin(self, token_NL: Tensor, embedding_NLD: Tensor, is_real_NL: Tensor, *, ends: Ends, memory: Memory | None
              ) -> tuple[Step, Tensor]:  # fmt: skip
        """The prompt itself is what decoding starts from."""
        return CausalStep(self, embedding_NLD, is_real_NL, ends=ends, memory=memory), token_NL

    def caption_logits(self, embedding_NLD: Tensor, is_real_NL: Tensor, token_NT: Tensor, is_caption_NT: Tensor) -> Tensor:
        """Prompt and caption in one pass."""
        num_new = token_NT.shape[1]
        whole_NLD = torch.cat([embedding_NLD, self.embedding()(token_NT)], dim=1)
        output = self.forward(whole_NLD, torch.cat([is_real_NL, is_caption_NT], dim=1), num_logits=num_new + 1)
        return output.logits[:, -num_new - 1 : -1]

    def forward(self, embedding_NLD: Tensor, is_real_NL: Tensor, *, cache: Any = None, num_logits: int = 1, **options: Any):
        """The model's output; `is_real_NL` is of all places, those in the cache too. Padding takes up no position."""
        options |= {"attention_mask": is_real_NL.long(), "past_key_values": cache}
        if "position_ids" in self._takes:
            position_NL = (is_real_NL.long().cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = position_NL[:, -embedding_NLD.shape[1] :]
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = num_logits
        return self.model(inputs_embeds=embedding_NLD, **options)

    def _num_places(self, num_prompt: int, num_new: int) -> int:
        return num_prompt + num_new


class CausalStep:
    """Next-token logits of a causal model; holds the cache of one decoding run, and the memory, projected once."""

    def __init__(self, architecture: CausalArchitecture, embedding_NLD: Tensor, is_real_NL: Tensor, *, ends: Ends,
                 memory: Memory | None):  # fmt: skip
        self.architecture, self.ends, self.memory = architecture, ends, memory
        self.embedding_NLD, self.is_real_NL = embedding_NLD, is_real_NL
        self.cache: Any = None

    def __call__(self, token_NT: Tensor, source_N: Tensor | None) -> Tensor:
        """NV; the first call stands for the whole prompt. `source_N`: which row of the last call each row continues."""
        if source_N is not None:
            self._reorder(source_N)
        embedding_NTD = self.embedding_NLD
        if self.cache is not None:
            embedding_NTD = self.architecture.embedding()(token_NT)
            self.is_real_NL = torch.cat([self.is_real_NL, torch.ones_like(token_NT, dtype=torch.bool)], dim=1)
        with self.memory.attended() if self.memory is not None else nullcontext():
            output = self.architecture.forward(embedding_NTD, self.is_real_NL, cache=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return self.ends.merge(output.logits[:, -1])

    def _reorder(self, source_N: Tensor) -> None:
        self.cache.reorder_cache(source_N)
        self.is_real_NL = self.is_real_NL[source_N]
        if self.memory is not None:
            self.memory = self.memory.take_rows(source_N)


class Seq2SeqArchitecture(Architecture):
    """The encoder reads the prompt, with padding to its right; the decoder writes from its own start token."""

    pads_right = True

    def __init__(self, model: Any, source: str):
        super().__init__(model, source)
        config = model.config
        start = config.decoder_start_token_id
        start = start if start is not None else getattr(config, "bos_token_id", None)
        if start is None:
            raise ConfigError(f"{source}: expected decoder_start_token_id or bos_token_id in its config.json, found neither")
        self.start: int = start

    def begin(self, token_NL: Tensor, embedding_NLD: Tensor, is_real_NL: Tensor, *, ends: Ends, memory: Memory | None
              ) -> tuple[Step, Tensor]:  # fmt: skip
        """One start token a row is what decoding starts from."""
        assert memory is None, "adapters are built for causal models only"
        step = Seq2SeqStep(self, self.encode(embedding_NLD, is_real_NL), is_real_NL, ends=ends)
        return step, self._starts(token_NL.shape[0], token_NL.device)

    def caption_logits(self, embedding_NLD: Tensor, is_real_NL: Tensor, token_NT: Tensor, is_caption_NT: Tensor) -> Tensor:
        """The captions moved on by one place, behind the start token."""
        starts_N1 = self._starts(token_NT.shape[0], token_NT.device)
        before_NT = torch.cat([starts_N1, token_NT[:, :-1]], dim=1)
        return self.forward(self.encode(embedding_NLD, is_real_NL), is_real_NL, before_NT, use_cache=False).logits

    def encode(self, embedding_NLD: Tensor, is_real_NL: Tensor) -> Tensor:
        """The encoder's states, NLD."""
        return self.model.get_encoder()(inputs_embeds=embedding_NLD, attention_mask=is_real_NL.long()).last_hidden_state

    def forward(self, state_NLD: Tensor, is_real_NL: Tensor, token_NT: Tensor, **options: Any):
        """The decoder's output. Padding behind a caption needs no mask: no token looks ahead."""
        states = BaseModelOutput(last_hidden_state=state_NLD)  # pyright: ignore[reportArgumentType]
        options |= {"encoder_outputs": states, "attention_mask": is_real_NL.long()}
        return self.model(decoder_input_ids=token_NT, **options)

    def _starts(self, num_rows: int, device: torch.device) -> Tensor:
        return torch.full((num_rows, 1), self.start, device=device)

    def _num_places(self, num_prompt: int, num_new: int) -> int:
        return max(num_prompt, num_new)


class Seq2SeqStep:
    """Next-token logits of a seq2seq model, whose encoder has read the prompt once."""

    def __init__(self, architecture: Seq2SeqArchitecture, state_NLD: Tensor, is_real_NL: Tensor, *, ends: Ends):
        self.architecture, self.ends = architecture, ends
        self.state_NLD, self.is_real_NL = state_NLD, is_real_NL
        self.cache: Any = None

    def __call__(self, token_NT: Tensor, source_N: Tensor | None) -> Tensor:
        """NV; `source_N` says which row of the last call each row continues."""
        if source_N is not None:
            self.cache.reorder_cache(source_N)
            self.state_NLD, self.is_real_NL = self.state_NLD[source_N], self.is_real_NL[source_N]
        output = self.architecture.forward(
            self.state_NLD, self.is_real_NL, token_NT, past_key_values=self.cache, use_cache=True
        )
        self.cache = output.past_key_values
        return self.ends.merge(output.logits[:, -1])
