"""Evaluation inside a run: retrieval on held-out shards."""

from collections.abc import Callable

import torch
from pydantic import Field

from sycoca.config import Config
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.distributed import copy_whole, is_whole, rank, world_size
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.models.sycoca import SyCoCa
from sycoca.pretrained import Pretrained
from sycoca.train.task import precision

CHOOSE_BY = "mean_recall"
"""The figure by which the best checkpoint is chosen."""


class EvaluateConfig(Config):
    """Held-out shards; retrieval on them `every` steps and at the end, 0 is never."""

    shards: list[str] = []
    every: int = 1000
    batch_size: int = Field(default=128, ge=1)
    num_samples: int = Field(default=8, ge=0)
    """Held-out pairs of which samples are written."""


def build_evaluation(
    config: EvaluateConfig, data: DataConfig, subject: Pretrained, *, is_bf16: bool
) -> Callable[[], dict[str, float]]:
    """A function that evaluates `subject` as it stands, on all ranks."""
    source = held_out(config, data)

    def evaluate() -> dict[str, float]:
        was_training = subject.model.training
        subject.model.eval()
        loader = build_eval_loader(source, rank=rank(), world_size=world_size(), batch_size=config.batch_size)
        with precision(subject.device, is_bf16=is_bf16):
            figures = RetrievalEvaluator(loader)(whole_on_this_rank(subject))
        subject.model.train(was_training)
        return figures

    return evaluate


def held_out(config: EvaluateConfig, data: DataConfig) -> DataConfig:
    """The training data's settings over the held-out shards, read without worker processes."""
    return data.model_copy(update={"shards": config.shards, "sources": [], "num_workers": 0})


def whole_on_this_rank(subject: Pretrained) -> Pretrained:
    """The subject itself; under ZeRO-3 and FSDP2 a copy of it with all weights. Every rank must call it.

    They gather each layer's weights from all ranks while it runs. An evaluator's shares are uneven, so a rank with fewer
    batches would leave the others waiting for ever; and a copy is gathered once, not in every batch.
    """
    if is_whole(subject.model):
        return subject
    model = subject.model
    vision = model.config.vision.model_copy(update={"pretrained": False})
    config = model.config.model_copy(update={"vision": vision})
    with torch.device("meta"):
        copy = SyCoCa(config, vocab_size=subject.tokenizer.vocab_size, max_tokens=model.max_tokens, parts=model.parts)
    copy = copy.to_empty(device=subject.device).eval()
    copy_whole(model, copy)
    return Pretrained(copy, subject.tokenizer, subject.config)
