"""Tiny models, batches and tasks for the tests. All sizes differ, so that a wrong axis cannot pass."""

from collections.abc import Iterable
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from sycoca.config import parse_config
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import ModelConfig, Part, SyCoCa
from sycoca.objectives.base import ObjectiveConfig
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.task import PretrainTask, needed_parts
from sycoca.types import Batch

NUM_PAIRS, NUM_TOKENS, MAX_TOKENS, VOCAB_SIZE = 4, 5, 7, 29
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 12, 4, 9
VISION_WIDTH, TEXT_WIDTH, EMBED_WIDTH, DECODER_WIDTH = 8, 12, 10, 16
ALL_PARTS: frozenset[Part] = frozenset(get_args(Part))
BOS, EOS = 27, 28

Objectives = dict[str, ObjectiveConfig]
ITC = ContrastiveConfig()
IC = CaptioningConfig(weight=2.0)
MASKED_IC = CaptioningConfig(weight=2.0, drop_share=0.5)
ABLATION_ROWS: dict[str, Objectives] = {
    "itc": {"itc": ITC},
    "ic": {"ic": IC},
    "coca": {"itc": ITC, "ic": IC},
    "masked_ic": {"itc": ITC, "ic": MASKED_IC},
    "mim_random": {"itc": ITC, "ic": IC, "mim": MaskedImageConfig(text_guided=False, mask="random")},
    "mim_attentive": {"itc": ITC, "ic": IC, "mim": MaskedImageConfig(text_guided=False)},
    "tg_mim_random": {"itc": ITC, "ic": IC, "tg_mim": MaskedImageConfig(mask="random")},
    "sycoca": {"itc": ITC, "ic": MASKED_IC, "tg_mim": MaskedImageConfig()},
}
"""The rows of the ablation of SyCoCa's paper, and captioning alone."""


def model_config(**changes: Any) -> ModelConfig:
    """A model of two layers a tower; `changes` replace whole fields, or fields of a nested mapping."""
    options = {"patch_size": PATCH_SIZE, "embed_dim": VISION_WIDTH, "depth": 2, "num_heads": 2}
    tree: dict[str, Any] = {
        "vision": {"name": "vit_tiny_patch16_224", "image_size": IMAGE_SIZE, "options": options},
        "embed_width": EMBED_WIDTH,
        "text": {"width": TEXT_WIDTH, "num_layers": 2, "num_heads": 2},
        "text_decoder": {"num_layers": 2},
        "image_decoder": {"width": DECODER_WIDTH, "num_layers": 2, "num_heads": 4},
    }
    for name, change in changes.items():
        tree[name] = tree[name] | change if isinstance(tree.get(name), dict) else change
    return parse_config(ModelConfig, tree, source="tests")


def vision_options(**changes: Any) -> dict[str, Any]:
    """The `vision` field of `model_config` with other timm options."""
    return {"options": model_config().vision.options | changes}


def build_model(parts: Iterable[str] = ALL_PARTS - {"encoder_mask_token"}, *, seed: int = 0, **changes: Any) -> SyCoCa:
    """In evaluation mode, with every parameter moved off its symmetric starting value."""
    torch.manual_seed(seed)
    chosen = cast(frozenset[Part], frozenset(parts))
    model = SyCoCa(model_config(**changes), vocab_size=VOCAB_SIZE, max_tokens=MAX_TOKENS, parts=chosen)
    shake(model)
    return model.eval()


def build_task(
    configs: Objectives, *, seed: int = 0, num_chunks: int = 1, is_bf16: bool = False,
    relevance: RelevanceConfig | None = None, **changes: Any,
) -> PretrainTask:  # fmt: skip
    """In training mode."""
    model = build_model(needed_parts(configs), seed=seed, **changes)
    relevance = relevance or RelevanceConfig()
    return PretrainTask(model, configs, relevance, num_chunks=num_chunks, is_bf16=is_bf16).train()


@torch.no_grad()
def shake(module: nn.Module, std: float = 0.1) -> None:
    """Add noise to all parameters: zero biases and unit norms would hide a bias that is left out or a norm skipped."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=std)


def build_batch(num_pairs: int = NUM_PAIRS, *, num_tokens: int = NUM_TOKENS, seed: int = 1) -> Batch:
    """Captions of unequal lengths from 3 (one word) to `num_tokens`; id 0 is a word and is the padding too, as in CLIP."""
    generator = torch.Generator().manual_seed(seed)
    length_B = torch.tensor([num_tokens, 3, *[4 + row % (num_tokens - 3) for row in range(num_pairs)]])[:num_pairs]
    token_BL = torch.randint(1, BOS, (num_pairs, num_tokens), generator=generator)
    token_BL[:, 0] = BOS
    token_BL[0, 1] = 0
    token_BL.scatter_(1, length_B[:, None] - 1, EOS)
    token_BL[torch.arange(num_tokens) >= length_B[:, None]] = 0
    image = torch.randn(num_pairs, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    keys = [f"image_{row}" for row in range(num_pairs)]
    return Batch(image=image, token=token_BL, length=length_B, key=keys, position={})


def take_rows(batch: Batch, rows: list[int]) -> Batch:
    """The pairs at the given places, in that order."""
    keys = [batch["key"][row] for row in rows]
    return Batch(image=batch["image"][rows], token=batch["token"][rows], length=batch["length"][rows], key=keys, position={})


def gradients(task: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter's gradient by name."""
    found = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"parameters without a gradient: {missing}"
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def run_backward(task: nn.Module, batch: Batch, *, seed: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch, random numbers from `seed`."""
    task.zero_grad()
    torch.manual_seed(seed)
    loss, _ = task(batch)
    loss.backward()
    return loss.detach(), gradients(task)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    """Relative to each parameter's gradient; where that is next to nothing, to a thousandth of the whole gradient."""
    assert actual.keys() == expected.keys()
    whole = torch.stack([grad.double().norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        error = (actual[name].double() - grad.double()).norm() / (grad.double().norm() + 1e-3 * whole)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
