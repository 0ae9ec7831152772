"""CgT-GAN's discriminator: reads a sentence and says whether a person wrote it."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from sycoca.captioners.lm import CaptionLM
from sycoca.config import Config
from sycoca.types import ConfigError


class SmallEncoderConfig(Config):
    """A bidirectional encoder with random weights, that reads the language model's tokens."""

    width: int = Field(default=128, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class DiscriminatorConfig(Config):
    """A pretrained encoder by name or folder (the paper: roberta-base), or a small one."""

    name: str | None = None
    small: SmallEncoderConfig | None = None
    hidden: int = Field(default=256, ge=1)
    """Width of the head's hidden layer."""
    max_tokens: int = Field(default=40, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        if (self.name is None) == (self.small is None):
            raise ValueError("expected either name, of a transformers encoder, or small: {width: ...}")
        return self


class Discriminator(nn.Module):
    """A transformers encoder with an MLP on what it pools; where it has no pooler of its own, on the mean of its states."""

    def __init__(self, encoder: Any, tokenizer: Any, *, hidden: int, max_tokens: int):
        super().__init__()
        if encoder.config.is_encoder_decoder:
            raise ConfigError("discriminator.name: expected a bidirectional encoder (roberta-base), found a seq2seq model")
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(encoder.config.hidden_size, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._filler: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def forward(self, texts: Sequence[str]) -> Tensor:
        """N float32: logits, above 0 for a text that a person wrote."""
        rows = [self._tokenizer.encode(text)[: self._max_tokens] or [self._filler] for text in texts]
        width, device = max(map(len, rows)), next(self.parameters()).device
        token_NL = torch.tensor([row + [self._filler] * (width - len(row)) for row in rows], device=device)
        length_N1 = torch.tensor([[len(row)] for row in rows], device=device)
        is_real_NL = torch.arange(width, device=device) < length_N1
        output = self.encoder(input_ids=token_NL, attention_mask=is_real_NL.long())
        pooled_ND = output.get("pooler_output")
        if pooled_ND is None:
            pooled_ND = (output.last_hidden_state * is_real_NL[..., None]).sum(1) / length_N1
        return self.head(pooled_ND).squeeze(-1).float()


def build_discriminator(config: DiscriminatorConfig, lm: CaptionLM) -> Discriminator:
    """As configured, all of it to train. Raises ConfigError where there is no such encoder."""
    if config.small is not None:
        encoder, tokenizer = _build_small(config.small, len(lm.tokenizer), max_tokens=config.max_tokens), lm.tokenizer
    else:
        name = str(config.name)
        try:
            encoder, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"discriminator.name: {name}: {' '.join(str(error).split())}") from error
    discriminator = Discriminator(encoder, tokenizer, hidden=config.hidden, max_tokens=config.max_tokens)
    return discriminator.to(lm.device).train()


def _build_small(config: SmallEncoderConfig, vocab_size: int, *, max_tokens: int) -> Any:
    if config.width % config.num_heads:
        raise ConfigError(f"discriminator.small: a width of {config.width} does not divide into {config.num_heads} heads")
    shape: dict[str, Any] = {"hidden_size": config.width, "num_hidden_layers": config.num_layers}
    shape |= {"num_attention_heads": config.num_heads, "intermediate_size": 4 * config.width}
    shape |= {"vocab_size": vocab_size, "max_position_embeddings": max_tokens}
    shape |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    return BertModel(BertConfig(**shape), add_pooling_layer=False)
