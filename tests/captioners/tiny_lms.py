"""Tiny language models of every kind, with random weights, and a tokenizer of few words."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from builders import shake
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.lm_loading import wrap_lm
from sycoca.captioners.prompt import PromptBatch, pad_prompts
from sycoca.data.tokenizer import train_prompt_tokenizer

TEXTS = ["a dog runs on the red mat .", "two cats sit in the sun .", "similar images show\n\nthis image shows a picture of"]
PROMPTS = ("a dog", "two cats sit in the red", "the")
"""Of different lengths, so that two of three are padded."""
CAUSAL, SEQ2SEQ = ("gpt2", "llama", "opt"), ("t5", "bart")
KINDS = (*CAUSAL, *SEQ2SEQ)
MAX_POSITIONS = 40
_WIDTH, _HEADS, _LAYERS = 12, 2, 2


@cache
def tokenizer_folder() -> Path:
    """A word tokenizer with bos, eos, pad and a line break."""
    folder = Path(tempfile.mkdtemp())
    train_prompt_tokenizer(TEXTS, folder)
    return folder


def build_tokenizer(**changes: Any) -> Any:
    """A fresh one; `changes` are special tokens, None takes one away."""
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder()))
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    return tokenizer


def build_causal(kind: str, *, num_extra: int = 2, **changes: Any) -> Any:
    """A transformers model whose vocabulary has `num_extra` rows that the tokenizer does not know."""
    sizes = {"vocab_size": len(build_tokenizer()) + num_extra, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(n_positions=MAX_POSITIONS, n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, **sizes | changes)
        return GPT2LMHeadModel(config)
    shape = {"hidden_size": _WIDTH, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS}
    shape |= {"max_position_embeddings": MAX_POSITIONS}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=20, num_key_value_heads=1, **shape, **sizes | changes))
    return OPTForCausalLM(OPTConfig(ffn_dim=20, word_embed_proj_dim=_WIDTH, **shape, **sizes | changes))


def build_seq2seq(kind: str) -> Any:
    """A transformers model with an encoder and a decoder."""
    sizes: dict[str, Any] = {"vocab_size": len(build_tokenizer()) + 2, "d_model": _WIDTH, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "t5":
        shape = {"d_kv": 6, "d_ff": 20, "num_layers": _LAYERS, "num_heads": _HEADS, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**sizes, **shape))
    shape = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in
             {"layers": _LAYERS, "attention_heads": _HEADS, "ffn_dim": 20}.items()}  # fmt: skip
    starts = {"decoder_start_token_id": 2, "bos_token_id": 1, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(max_position_embeddings=MAX_POSITIONS, **sizes, **shape, **starts))


def build_lm(kind: str = "gpt2", *, seed: int = 1, stops: tuple[str, ...] = (), **changes: Any) -> CaptionLM:
    """A wrapped model; with its weights far from zero, so that its choices differ and depend on the prompt."""
    torch.manual_seed(seed)
    model = build_causal(kind, **changes) if kind in CAUSAL else build_seq2seq(kind)
    shake(model, std=0.4)
    return wrap_lm(model, build_tokenizer(), stops=stops)


def prompts(lm: CaptionLM, texts: tuple[str, ...] = PROMPTS) -> PromptBatch:
    """The texts as one batch."""
    return pad_prompts([lm.encode_prompt(text) for text in texts], lm.pad)


@torch.no_grad()
def plain_logits(lm: CaptionLM, text: str, written: list[int]) -> Tensor:
    """(T + 1, V): transformers' own logits for each next token of one row, without batch, padding, embeddings or cache."""
    ids = torch.tensor([lm.encode_prompt(text)])
    after = torch.tensor([written], dtype=torch.int64)
    model: Any = lm.model
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id]])
        return model(input_ids=ids, decoder_input_ids=torch.cat([start, after], 1), use_cache=False).logits[0]
    return model(input_ids=torch.cat([ids, after], 1), use_cache=False).logits[0, ids.shape[1] - 1 :]
