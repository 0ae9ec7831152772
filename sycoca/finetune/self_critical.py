"""Self-critical sequence training: captions are drawn from the model, rated, and made more or less probable by their rating.

Rennie et al., "Self-critical Sequence Training for Image Captioning" (arXiv:1612.00563), with the loss
L = -(r(w) - b) sum_t log p(w_t | w_<t, image), mean over the drawn captions. The baseline b is the rating of the greedy caption
(their choice), or the mean rating of the image's other drawn captions (Luo, arXiv:2003.09971). Both leave the expected gradient
as it is, that of -E[r].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.config import Config
from sycoca.data.tokenizer import Tokenizer
from sycoca.generation import Generated, GenerationConfig, decode
from sycoca.models.decoding import CaptionStep
from sycoca.models.likelihood import token_log_probs
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import SyCoCa
from sycoca.train.task import PretrainTask, precision
from sycoca.types import Batch, Metrics


class SelfCriticalConfig(Config):
    """What is drawn, and what its rating is compared with."""

    baseline: Literal["greedy", "mean"] = "mean"
    num_samples: int = Field(default=5, ge=1)
    """Captions drawn for an image, from the model's own distribution."""
    max_tokens: int = Field(default=24, ge=1)
    """Tokens of a drawn caption at most, its end counted."""

    @model_validator(mode="after")
    def _check(self) -> "SelfCriticalConfig":
        if self.baseline == "mean" and self.num_samples == 1:
            raise ValueError("baseline: mean compares an image's captions with each other; set num_samples to 2 or more")
        return self


class Reward(Protocol):
    """Rates a written caption of the image of a sample."""

    def __call__(self, caption: str, key: str, /, *, is_ended: bool) -> float: ...


class SelfCriticalTask(PretrainTask):
    """The captioning task with a rating in the place of the cross-entropy; a batch's own captions are not read.

    Captions are drawn without dropout, from torch's global generator: the same seed draws the same captions.
    """

    def __init__(
        self, model: SyCoCa, tokenizer: Tokenizer, config: SelfCriticalConfig, reward: Reward, *, is_bf16: bool = False
    ):
        super().__init__(model, {}, RelevanceConfig(), is_bf16=is_bf16)
        self.tokenizer, self.config, self.reward = tokenizer, config, reward
        self.max_tokens = min(config.max_tokens, model.max_tokens - 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss (its mean over ranks is that of the whole batch), mean rating and baseline, mean length in tokens."""
        image_BCHW, num_samples = batch["image"], self.config.num_samples
        with precision(image_BCHW.device, is_bf16=self.is_bf16, is_recomputed=self.model.config.recompute):
            patch_BPD, _ = self.model.vision(image_BCHW)
            drawn = self._write(patch_BPD, method="top_p", num_return=num_samples)
            log_prob_BJ = self.log_prob(patch_BPD, drawn)
            greedy = self._write(patch_BPD, method="greedy") if self.config.baseline == "greedy" else None
        reward_BJ = self.rate(drawn, batch["key"])
        baseline_BJ = mean_of_others(reward_BJ) if greedy is None else self.rate(greedy, batch["key"]).expand_as(reward_BJ)
        loss = self_critical_loss(log_prob_BJ, reward_BJ - baseline_BJ)
        metrics = {
            "loss": loss.detach(), "reward": reward_BJ.mean(), "baseline": baseline_BJ.mean(),
            "num_tokens": drawn.length_NJ.float().mean(),
        }  # fmt: skip
        return loss, metrics

    def rate(self, written: Generated, keys: Sequence[str]) -> Tensor:
        """BJ float32: the ratings of the written captions, on their device."""
        eos, rows = self.tokenizer.eos, written.token_NJT.tolist()
        reward = [
            [self.reward(self.tokenizer.decode(row), key, is_ended=eos in row) for row in of_image]
            for key, of_image in zip(keys, rows, strict=True)
        ]
        return torch.tensor(reward, device=written.token_NJT.device)

    def log_prob(self, patch_BPD: Tensor, written: Generated) -> Tensor:
        """BJ float32, with gradient: the log-probability of each caption, its end token counted where it has one."""
        num_samples = written.token_NJT.shape[1]
        token_NT = rearrange(written.token_NJT, "b j t -> (b j) t")
        token_NL = F.pad(token_NT, (1, 0), value=self.tokenizer.bos)
        length_N = rearrange(written.length_NJ, "b j -> (b j)") + 1
        patch_NPD = patch_BPD.repeat_interleave(num_samples, dim=0)
        log_prob_NT = token_log_probs(self.model, patch_NPD, token_NL, length_N)
        return rearrange(log_prob_NT.sum(1), "(b j) -> b j", j=num_samples)

    @torch.no_grad()
    def _write(self, patch_BPD: Tensor, *, method: Literal["greedy", "top_p"], num_return: int = 1) -> Generated:
        is_whole_here = all(parameter.numel() > 0 for parameter in self.model.parameters())
        generation = GenerationConfig(
            method=method, top_p=1.0, num_return=num_return, max_tokens=self.max_tokens, stop_early=is_whole_here
        )
        prompt_B1 = torch.full((patch_BPD.shape[0], 1), self.tokenizer.bos, device=patch_BPD.device)
        with evaluating(self.model):
            return decode(CaptionStep(self.model, patch_BPD.detach()), prompt_B1, generation, eos=self.tokenizer.eos)


def self_critical_loss(log_prob_BJ: Tensor, advantage_BJ: Tensor) -> Tensor:
    """Mean over captions of -(r - b) log p(caption): its gradient is that of REINFORCE (Rennie et al.)."""
    return -(advantage_BJ.detach() * log_prob_BJ).mean()


def mean_of_others(reward_BJ: Tensor) -> Tensor:
    """BJ: for each caption, the mean rating of the image's other captions (Luo)."""
    return (reward_BJ.sum(1, keepdim=True) - reward_BJ) / (reward_BJ.shape[1] - 1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode for a while: no dropout, and no recomputation, which knows no cache."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
