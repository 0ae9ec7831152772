"""Floating point operations of a training step, counted from the model's sizes, and how fast the device could be.

A multiplication and an addition are two operations. Only matrix products are counted, as torch.utils.flop_counter does:
attention whole, causal or not, over padded texts; all else of a text on its packed rows. Training is three times the forward
pass (PaLM, arXiv:2204.02311, appendix B): what is recomputed to save memory is not counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sycoca.distributed import world_size
from sycoca.models.masking import num_selected
from sycoca.models.packing import num_packed
from sycoca.models.sycoca import SyCoCa
from sycoca.models.vision import VisionEncoder
from sycoca.objectives.base import Objective
from sycoca.objectives.captioning import CaptioningObjective
from sycoca.objectives.contrastive import ContrastiveObjective
from sycoca.objectives.masked_image import MaskedImageObjective
from sycoca.train.task import PretrainTask
from sycoca.types import Batch

BACKWARD_TOO = 3
"""A training step against its forward pass: two products backward for one forward."""
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75), "H200": (989, 67), "H100 PCIe": (756, 51), "H100 NVL": (835, 60), "GH200": (989, 67), "H100": (989, 67),
    "A100": (312, 19.5), "A800": (312, 19.5), "L40S": (362, 91.6), "L40": (181, 90.5), "L4": (121, 30.3), "A40": (149.7, 37.4),
    "A30": (165, 10.3), "A10G": (70, 31.5), "A10": (125, 31.2), "RTX A6000": (154.8, 38.7), "RTX 6000 Ada": (364, 91.1),
    "RTX 5090": (209.5, 104.8), "RTX 4090": (165.2, 82.6), "RTX 3090": (71, 35.6),
}  # fmt: skip
"""Dense bf16 with float32 sums, and float32 without TF32, by a part of the device's name; the longest that fits counts. From
NVIDIA's data sheets."""


def peak_tflops(device_name: str, *, is_bf16: bool) -> float | None:
    """What the device can do at most; None where the table does not know it."""
    fitting = [name for name in PEAK_TFLOPS if name.lower() in device_name.lower()]
    return PEAK_TFLOPS[max(fitting, key=len)][0 if is_bf16 else 1] if fitting else None


def peak_of(device: torch.device, *, is_bf16: bool) -> float | None:
    """The peak of a device that this process uses, in TFLOP/s; None for a CPU, whose peak no name tells."""
    return peak_tflops(torch.cuda.get_device_name(device), is_bf16=is_bf16) if device.type == "cuda" else None


def find_counter(task: nn.Module) -> Callable[[Batch], float] | None:
    """Counts a training step on a batch, or None for a task that this file does not know."""
    if type(task) is not PretrainTask:
        return None
    if not all(isinstance(member, _COUNTED) for member in task.members().values()):
        return None
    return lambda batch: BACKWARD_TOO * forward_flops(task, batch)


def forward_flops(task: PretrainTask, batch: Batch) -> float:
    """Of the whole task on this rank: one encoding, relevance, and every objective."""
    model, num_pairs, num_tokens = task.model, batch["image"].shape[0], batch["token"].shape[1]
    num_real = int(batch["length"].sum())
    num_targets = num_real - num_pairs
    total = num_pairs * encode_flops(model)
    if model.text is not None:
        num_more = int(model.text.summary_D is not None)
        total += text_flops(model.text.stack, num_real + num_more * num_pairs, num_pairs, num_tokens + num_more)
    if task.needs_relevance:
        total += num_pairs * relevance_flops(task, num_tokens)
    for member in task.members().values():
        total += num_pairs * objective_flops(model, member, num_tokens)
        if isinstance(member, CaptioningObjective):
            assert model.text_decoder is not None
            vocabulary, num_seen = model.text_decoder.vocabulary, num_patches_seen(model, member)
            total += text_flops(model.text_decoder.stack, num_targets, num_pairs, num_tokens, num_seen)
            total += linear_flops(num_targets, vocabulary.width, vocabulary.vocab_size)
        if isinstance(member, ContrastiveObjective):
            total += 2 * linear_flops(num_pairs, num_pairs * world_size(), model.config.embed_width)
    return total


def encode_flops(model: SyCoCa) -> float:
    """One pair, but for the text encoder: the image encoder, and what projects both into the shared space."""
    vision = model.vision
    total = vision_flops(vision, vision.num_patches)
    if model.image_projection is not None:
        num_projected = vision.num_patches if model.config.pool == "max" else 1
        total += linear_flops(num_projected, vision.width, model.config.embed_width)
        total += linear_flops(1, model.config.text.width, model.config.embed_width)
    if model.image_pool is not None:
        total += cross_attention_flops(model.image_pool.attention, 1, vision.num_patches)
    return total


def vision_flops(vision: VisionEncoder, num_kept: int) -> float:
    """One image of which `num_kept` patches are encoded; all of them are embedded."""
    vit = vision.vit
    total = linear_flops(vision.num_patches, 3 * vision.patch_size**2, vision.width)
    num_states = num_kept + vision.num_prefix_tokens
    for block in vit.blocks:
        total += num_states * linears_flops(block) + attention_flops(num_states, num_states, vision.width)
    return total


def relevance_flops(task: PretrainTask, num_tokens: int) -> float:
    """One pair: patches and words into their common space, and all cosines. Without gradient, yet counted as the rest."""
    model, config = task.model, task.relevance
    num_words = num_tokens + (config.words != "tokens")
    width = model.vision.width
    total = 0.0
    if config.space == "itc":
        width = model.config.embed_width
        total += linear_flops(model.vision.num_patches, model.vision.width, width)
        total += linear_flops(num_words, model.config.text.width, width)
    return total + linear_flops(model.vision.num_patches, num_words, width)


def objective_flops(model: SyCoCa, objective: Objective, num_tokens: int) -> float:
    """One pair, beyond its encoding; captioning and similarities, which depend on the whole batch, are left out."""
    return masked_image_flops(model, objective, num_tokens) if isinstance(objective, MaskedImageObjective) else 0.0


def num_patches_seen(model: SyCoCa, objective: CaptioningObjective) -> float:
    """By the text decoder, on average over batches."""
    num_patches, config = model.vision.num_patches, objective.config
    return num_patches - config.drop_prob * num_selected(num_patches, config.drop_share)


def masked_image_flops(model: SyCoCa, objective: MaskedImageObjective, num_tokens: int) -> float:
    """One pair: the second encoding, and the image decoder over the masked patches."""
    decoder, vision, config = model.image_decoder, model.vision, objective.config
    assert decoder is not None
    num_masked = num_selected(vision.num_patches, config.mask_share)
    num_seen = vision.num_patches - (num_masked if config.encode != "mask_tokens" else 0)
    total = 0.0 if config.encode == "features" else vision_flops(vision, num_seen)
    total += num_seen * linears_flops(decoder.embed) + num_masked * linears_flops(decoder.to_pixels)
    num_memory = num_seen
    if decoder.embed_caption is not None and config.text_guided:
        total += (num_tokens + 1) * linears_flops(decoder.embed_caption)
        num_memory += num_tokens + 1
    return total + stack_flops(decoder.stack, num_masked, num_memory)


def text_flops(stack: Any, num_real: int, num_pairs: int, num_places: int, num_memory: float = 0) -> float:
    """A padded batch of texts, packed, through a stack of our blocks; every text has a memory of its own."""
    share = num_packed(num_real, num_pairs * num_places) / (num_pairs * num_places)
    return num_pairs * stack_flops(stack, num_places, num_memory, share=share)


def stack_flops(stack: Any, num_states: int, num_memory: float = 0, *, share: float = 1.0) -> float:
    """One sequence through a stack of our blocks, with cross-attention where they have it; `share` of it is packed."""
    total = 0.0
    for block in stack.blocks:
        width = block.self_attention.out.in_features
        total += share * num_states * (linears_flops(block.self_attention) + linears_flops(block.mlp))
        total += attention_flops(num_states, num_states, width)
        if block.has_memory:
            total += cross_attention_flops(block.cross_attention, num_states, num_memory, share=share)
    return total


def cross_attention_flops(attention: Any, num_states: int, num_memory: float, *, share: float = 1.0) -> float:
    """Queries from the states, keys and values from the memory."""
    total = share * num_states * (linears_flops(attention.query) + linears_flops(attention.out))
    total += num_memory * linears_flops(attention.key_value)
    return total + attention_flops(num_states, num_memory, attention.out.in_features)


def linears_flops(module: nn.Module) -> float:
    """One row through every linear layer in a module."""
    return sum(2.0 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def linear_flops(num_rows: int, num_in: int, num_out: int) -> float:
    """A matrix product."""
    return 2.0 * num_rows * num_in * num_out


def attention_flops(num_queries: int, num_keys: float, width: int) -> float:
    """Scores and their weighted sum, all heads together."""
    return 4.0 * num_queries * num_keys * width


_COUNTED = (ContrastiveObjective, CaptioningObjective, MaskedImageObjective)
