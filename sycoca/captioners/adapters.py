"""SmallCap's cross-attention (arXiv:2209.15323): every layer of a frozen causal language model learns to look at the image.

It stands where a transformer's cross-attention does, between self-attention and the feed-forward part, and is narrow: queries
d -> d/f, keys and values d_enc -> 2d/f, output d/f -> d, with as many heads as the layer. The layers are not changed: hooks
take a layer's input and add to what its self-attention gives.

Two choices. The norm in front has no parameters (in the authors' code it is frozen at one and zero). The output starts at
zero, so that training begins with exactly the frozen model; the authors start it from a narrow normal distribution.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.types import ConfigError

SELF_ATTENTION = {
    "gpt2": ("transformer.h", "attn"),
    "opt": ("model.decoder.layers", "self_attn"),
    "llama": ("model.layers", "self_attn"),
    "mistral": ("model.layers", "self_attn"),
    "qwen2": ("model.layers", "self_attn"),
}
"""By transformers' `model_type`: where the layers are, and what a layer calls its self-attention. Layers of all of them add
the output of self-attention to their input."""
WEIGHT_STD = 0.02
"""Of queries, keys and values at the start (GPT-2's)."""


class MemoryKeys(NamedTuple):
    """Keys and values of one layer, (N, heads, M, d / f / heads)."""

    key: Tensor
    value: Tensor


class CrossAttention(nn.Module):
    """The new part of one layer."""

    def __init__(self, width: int, memory_width: int, *, num_heads: int, reduction: int, dropout: float):
        super().__init__()
        inner = width // reduction
        self.num_heads = num_heads
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(memory_width, 2 * inner)
        self.out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key_value, self.out):
            nn.init.normal_(layer.weight, std=WEIGHT_STD)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)

    def project(self, memory_NMF: Tensor) -> MemoryKeys:
        """What the layer reads of the memory, the same for every token."""
        return MemoryKeys(*rearrange(self.key_value(memory_NMF), "n m (kv h d) -> kv n h m d", kv=2, h=self.num_heads))

    def forward(self, state_NLD: Tensor, memory: MemoryKeys) -> Tensor:
        """NLD: what is added to the state."""
        normed_NLD = F.layer_norm(state_NLD, state_NLD.shape[-1:]).to(self.query.weight.dtype)
        query = rearrange(self.query(normed_NLD), "n l (h d) -> n h l d", h=self.num_heads)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, memory.key, memory.value, dropout_p=dropout)
        return self.dropout(self.out(rearrange(mixed, "n h l d -> n l (h d)"))).to(state_NLD.dtype)


class CrossAttentionAdapters(nn.Module):
    """The new parts of all layers of a model. While no memory is attended to, the model is what it was."""

    def __init__(self, model: Any, memory_width: int, *, reduction: int = 4, dropout: float = 0.1):
        super().__init__()
        layers, name = find_layers(model)
        width, num_heads = model.config.hidden_size, model.config.num_attention_heads
        if reduction < 1 or width % (reduction * num_heads):
            raise ConfigError(
                f"reduction: the model is {width} wide with {num_heads} heads; expected a factor that leaves whole numbers "
                f"for every head, found {reduction}"
            )
        self.layers = nn.ModuleList(
            CrossAttention(width, memory_width, num_heads=num_heads, reduction=reduction, dropout=dropout) for _ in layers
        )
        self._memory: list[MemoryKeys] | None = None
        self._state_NLD: Tensor | None = None
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            getattr(layer, name).register_forward_hook(partial(self._add_attended, number))

    def project(self, memory_NMF: Tensor) -> "Memory":
        """The memory as every layer reads it; made once for a decoding run."""
        memory_NMF = memory_NMF.to(next(self.parameters()).dtype)
        return Memory(self, [layer.project(memory_NMF) for layer in self._members()])

    def _members(self) -> list[CrossAttention]:
        return [layer for layer in self.layers if isinstance(layer, CrossAttention)]

    @contextmanager
    def attending(self, memory: list[MemoryKeys]) -> Iterator[None]:
        """The model looks at this memory, row by row, as long as the context lasts."""
        assert self._memory is None, "one memory at a time"
        self._memory = memory
        try:
            yield
        finally:
            self._memory = self._state_NLD = None

    def _keep_input(self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._memory is not None:
            self._state_NLD = args[0] if args else options["hidden_states"]

    def _add_attended(self, number: int, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._memory is None:
            return output
        assert self._state_NLD is not None, "the layer's input was kept before its self-attention ran"
        assert isinstance(output, tuple), "self-attention gives its output and its weights"
        added_NLD, *others = output
        attended_NLD = self.layers[number](self._state_NLD + added_NLD, self._memory[number])
        return (added_NLD + attended_NLD, *others)


@dataclass(frozen=True, slots=True)
class Memory:
    """What all layers read of the images, one row of prompts a row."""

    adapters: CrossAttentionAdapters
    keys: list[MemoryKeys]

    def take_rows(self, source_N: Tensor) -> "Memory":
        """The rows at these places, some maybe twice."""
        return Memory(self.adapters, [MemoryKeys(key[source_N], value[source_N]) for key, value in self.keys])

    def attended(self) -> AbstractContextManager[None]:
        """A context in which the model looks at it."""
        return self.adapters.attending(self.keys)


def find_layers(model: Any) -> tuple[list[nn.Module], str]:
    """The model's layers, and the name of self-attention in each. Raises ConfigError for a kind that is not known here."""
    kind = model.config.model_type
    if kind not in SELF_ATTENTION:
        raise ConfigError(
            f"cross-attention adapters know the layers of {', '.join(SELF_ATTENTION)}; {kind!r} needs a line in "
            "captioners/adapters.py, or another way in (a prefix, or retrieved captions)"
        )
    path, name = SELF_ATTENTION[kind]
    return list(model.get_submodule(path)), name
