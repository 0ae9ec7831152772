"""Evaluation inside a run: retrieval on held-out shards."""

from collections.abc import Callable

from pydantic import Field

from sycoca.config import Config
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.tokenizer import build_tokenizer
from sycoca.distributed import rank, world_size
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.pretrained import Pretrained
from sycoca.train.task import precision

CHOOSE_BY = "mean_recall"
"""The figure by which the best checkpoint is chosen."""


class EvaluateConfig(Config):
    """Held-out shards; `every` steps, 0 is only at the end."""

    shards: list[str] = []
    every: int = 1000
    batch_size: int = Field(128, ge=1)
    num_samples: int = Field(8, ge=0)
    """Held-out pairs of which samples are written."""


def build_evaluation(
    config: EvaluateConfig, data: DataConfig, subject: Pretrained, *, is_bf16: bool
) -> Callable[[], dict[str, float]]:
    """A function that evaluates `subject` as it stands, on all ranks."""
    source = held_out(config, data)
    tokenizer = build_tokenizer(data.tokenizer.name)

    def evaluate() -> dict[str, float]:
        was_training = subject.model.training
        subject.model.eval()
        loader = build_eval_loader(source, tokenizer, rank=rank(), world_size=world_size(), batch_size=config.batch_size)
        with precision(subject.device, is_bf16=is_bf16):
            figures = RetrievalEvaluator(loader)(subject)
        subject.model.train(was_training)
        return figures

    return evaluate


def held_out(config: EvaluateConfig, data: DataConfig) -> DataConfig:
    """The training data's settings over the held-out shards, read without worker processes."""
    return data.model_copy(update={"shards": config.shards, "num_workers": 0})
