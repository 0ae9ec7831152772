"""What is trained: a model and its objectives behind one `forward`. This, and only this, goes to `accelerator.prepare`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sycoca.distributed import sum_over_ranks
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.objectives.base import Objective, ObjectiveConfig
from sycoca.types import Batch, ConfigError, Features, Metrics


@contextmanager
def precision(device: torch.device, *, is_bf16: bool, is_recomputed: bool = False) -> Iterator[None]:
    """bfloat16 matrix products, if asked for. On a CPU the plain attention kernel: the flash backward is half as fast there.

    Not where activations are recomputed: that happens in the backward pass, outside of this, and must choose the same kernel.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=is_bf16))
        if is_bf16 and device.type == "cpu" and not is_recomputed:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def needed_parts(objectives: Mapping[str, Any]) -> frozenset[Part]:
    """The union of what the objectives need of the model, from their configurations."""
    return frozenset().union(*(config.build().needs for config in objectives.values()))


class PretrainTask(nn.Module):
    """Encode once, then the weighted sum of the objectives.

    num_chunks > 1 works the batch off in that many pieces whose activations are recomputed in the backward pass, random
    state included (gradient caching): memory of one piece, gradients of the whole batch, the contrastive batch stays whole.
    """

    step: Tensor

    def __init__(
        self, model: SyCoCa, configs: Mapping[str, ObjectiveConfig], relevance: RelevanceConfig, *, num_chunks: int = 1,
        is_bf16: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict({name: config.build() for name, config in configs.items()})  # pyright: ignore
        self.weights = {name: config.weight for name, config in configs.items()}
        self.relevance, self.num_chunks, self.is_bf16 = relevance, num_chunks, is_bf16
        self.needs_relevance = any(objective.needs_relevance for objective in self.members().values())
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if self.needs_relevance:
            check_relevance(model, relevance)

    def members(self) -> dict[str, Objective]:
        """The objectives by name."""
        return {name: module for name, module in self.objectives.items() if isinstance(module, Objective)}

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss (its mean over ranks is the loss of the whole batch) and each objective's metrics, `name/metric`."""
        if self.training:
            self.step += 1  # before, not after: chunks are encoded once more in the backward pass and must see the same step
        results = self.results(batch)
        loss = torch.stack([self.weights[name] * result[0] for name, result in results.items()]).sum()
        metrics = {f"{name}/{key}": value for name, result in results.items() for key, value in result[1].items()}
        return loss, {"loss": loss.detach(), **metrics}

    def results(self, batch: Batch) -> dict[str, tuple[Tensor, Metrics]]:
        """Each objective's loss, without its weight, and metrics; counts no step."""
        # here and not by the engine: the parameters stay float32 under DDP and every ZeRO stage alike
        is_recomputed = self.num_chunks > 1 or self.model.config.recompute
        with precision(batch["image"].device, is_bf16=self.is_bf16, is_recomputed=is_recomputed):
            return self._forward_whole(batch) if self.num_chunks == 1 else self._forward_in_chunks(batch)

    def _forward_whole(self, batch: Batch) -> dict[str, tuple[Tensor, Metrics]]:
        features = self.encode(batch)
        return {name: member(self.model, batch, features) for name, member in self.members().items()}

    def encode(self, batch: Batch) -> Features:
        """The model's features, and the relevance of patches where an objective masks by it."""
        features = self.model.encode(batch)
        if not self.needs_relevance:
            return features
        until = self.relevance.random_until_step
        if self.training and until > 0 and int(self.step) <= until:  # reading the step waits for the device: only where needed
            score_BP = torch.rand(features.patch_BPD.shape[:2], device=features.patch_BPD.device)
        else:
            score_BP = self.model.relevance(features, batch["length"], self.relevance)
        return replace(features, relevance_BP=score_BP)

    def _forward_in_chunks(self, batch: Batch) -> dict[str, tuple[Tensor, Metrics]]:
        chunks = split_batch(batch, self.num_chunks)
        separable = {name: member for name, member in self.members().items() if member.is_separable}
        parts = [checkpoint(self._encode_chunk, chunk, separable, use_reentrant=False) for chunk in chunks]
        images, texts, losses = zip(*parts, strict=True)  # pyright: ignore
        results: dict[str, tuple[Tensor, Metrics]] = {}
        for number, (name, member) in enumerate(separable.items()):
            mass = torch.stack([sum_over_ranks(member.mass(chunk)) for chunk in chunks])
            loss = (torch.stack([loss[number] for loss in losses]) * mass / mass.sum()).sum()
            results[name] = (loss, {"loss": loss.detach()})
        for name, member in self.members().items():
            if name not in separable:
                nothing = images[0].new_zeros(0)
                whole = Features(nothing, nothing, None, torch.cat(images), torch.cat(texts))
                results[name] = member(self.model, batch, whole)
        return results

    def _encode_chunk(self, chunk: Batch, separable: dict[str, Objective]) -> tuple[Tensor, Tensor, list[Tensor]]:
        features = self.encode(chunk)
        nothing = features.patch_BPD.new_zeros(0)
        image_BE = nothing if features.image_BE is None else features.image_BE
        text_BE = nothing if features.text_BE is None else features.text_BE
        return image_BE, text_BE, [member(self.model, chunk, features)[0] for member in separable.values()]


def check_relevance(model: SyCoCa, relevance: RelevanceConfig) -> None:
    """Raises ConfigError where this model cannot score patches against captions as asked."""
    if model.text is None:
        raise ConfigError("relevance: nothing reads the caption with these objectives; add one of type itc, or mask at random")
    if relevance.space == "itc" and "contrast" not in model.parts:
        raise ConfigError(
            "relevance.space: 'itc' needs an objective of type itc; add one, use space: encoder, or select at random"
        )
    widths = model.vision.width, model.config.text.width
    if relevance.space == "encoder" and widths[0] != widths[1]:
        raise ConfigError(
            f"relevance.space: 'encoder' needs towers of one width, found {widths[0]} and {widths[1]}; use space: itc"
        )
    if relevance.words != "tokens" and model.text.summary_D is None:
        raise ConfigError(
            f"relevance.words: {relevance.words!r} needs the summary token of itc or text-guided tg_mim; use words: tokens"
        )


def split_batch(batch: Batch, num_chunks: int) -> list[Batch]:
    """Equal pieces of a batch in order; every tensor keeps its padding."""
    size = batch["image"].shape[0]
    if size % num_chunks:
        raise ConfigError(f"optim.num_chunks: a batch of {size} does not divide into {num_chunks} chunks")
    rows = size // num_chunks
    return [
        Batch(
            image=batch["image"][start : start + rows],
            token=batch["token"][start : start + rows],
            length=batch["length"][start : start + rows],
            key=batch["key"][start : start + rows],
            position=batch["position"],
        )
        for start in range(0, size, rows)
    ]
