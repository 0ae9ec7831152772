"""From a transformers name or folder to a `CaptionLM`, or the reason why it cannot be one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.lm_architectures import CausalArchitecture, Seq2SeqArchitecture
from sycoca.config import Config
from sycoca.types import ConfigError


class LMConfig(Config):
    """Which language model writes."""

    name: str
    """Of a transformers model, or its folder."""
    stops: list[str] = []
    """Texts of one token that end a caption as eos does."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def load(self, device: torch.device | str) -> CaptionLM:
        """The frozen model. Raises ConfigError."""
        return load_lm(self.name, device=device, dtype=getattr(torch, self.dtype), stops=self.stops)


def load_lm(
    name_or_folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    stops: Sequence[str] = (),
) -> CaptionLM:  # fmt: skip
    """A frozen language model: causal or seq2seq, whichever its config.json says.

    stops: texts of one token that end a caption as eos does ("." and a line break for models that were never taught to
    end one). Raises ConfigError where nothing is found, the tokenizer has no eos, or the model cannot be padded.
    """
    source = str(name_or_folder)
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"language model {source}: expected a folder with a transformers model and its tokenizer, or the name of a causal "
            f"or seq2seq model; {' '.join(str(error).split())}"
        ) from error
    return wrap_lm(model, tokenizer, source=source, stops=stops).to(device)


def wrap_lm(model: Any, tokenizer: Any, *, source: str = "language model", stops: Sequence[str] = ()) -> CaptionLM:
    """The same from a transformers model and tokenizer; the model is frozen. Raises ConfigError."""
    kind = Seq2SeqArchitecture if model.config.is_encoder_decoder else CausalArchitecture
    architecture = kind(model, source)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{source}: its tokenizer has no eos token, so captions would have no end; save a copy with eos_token set"
        )
    num_rows = architecture.embedding().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ConfigError(f"{source}: the tokenizer has {len(tokenizer)} tokens and the model {num_rows}; take the model's own")
    pad = find_pad(model, tokenizer, source=source)
    return CaptionLM(architecture, tokenizer, pad=pad, stops=[find_stop(text, tokenizer, source=source) for text in stops])


def find_pad(model: Any, tokenizer: Any, *, source: str) -> int:
    """The id that fills rows up: pad, or eos in a causal model, where a mask hides it and no label is made of it.

    A seq2seq model without pad is refused: what its decoder starts from, and what its encoder leaves out, often is pad.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{source}: its tokenizer has no pad token; save a copy with the pad_token it was trained with")
    return tokenizer.eos_token_id


def find_stop(text: str, tokenizer: Any, *, source: str) -> int:
    """The token of a stop text. Raises ConfigError where it is not one token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(f"{source}: expected stop texts of one known token, {text!r} is {pieces}")
    return ids[0]
