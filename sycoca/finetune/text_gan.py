"""The two tasks of CgT-GAN: the generator from text alone, then generator and discriminator against each other.

Both players are one task of the project's trainer: their losses are added, and no gradient flows from one to the other's
weights. Sampled words carry none to the generator, and rewards are numbers to it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sycoca.captioners.cgtgan import Generator
from sycoca.distributed import sum_over_ranks, world_size
from sycoca.finetune.discriminator import Discriminator
from sycoca.finetune.self_critical import SelfCriticalConfig, evaluating, mean_of_others, self_critical_loss
from sycoca.finetune.text_rewards import Rate, RewardConfig
from sycoca.generation import Generated, GenerationConfig
from sycoca.train.task import precision
from sycoca.types import Metrics


class PolicyConfig(SelfCriticalConfig):
    """What is drawn, and what its reward is compared with; the defaults are the paper's."""

    baseline: Literal["greedy", "mean"] = "greedy"
    """The greedy caption's reward, or the mean of the image's other drawn captions."""
    max_tokens: int = Field(default=20, ge=1)
    """Tokens of a caption at most, its end counted."""


class ReconstructionTask(nn.Module):
    """Cross-entropy of sentences, written from their own text embeddings: no image has a part in it."""

    def __init__(self, generator: Generator, *, is_bf16: bool):
        super().__init__()
        self.generator, self.is_bf16 = generator, is_bf16

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """Nats a token; the mean over ranks is that of the whole batch."""
        with precision(batch["embedding"].device, is_bf16=self.is_bf16):
            log_prob_NT = self.generator.log_probs(batch["embedding"], batch["token"], batch["length"])
        num_tokens = batch["length"].sum().to(log_prob_NT)
        loss = -log_prob_NT.sum() * world_size() / sum_over_ranks(num_tokens)
        return loss, {"loss": loss.detach()}


class AdversarialTask(nn.Module):
    """Self-critical policy gradient on the mean log-probability of a caption's tokens, and the discriminator's cross-entropy.

    Captions are drawn, and their probability is computed, without dropout, so that both are of one policy; from torch's global
    generator: the same seed draws the same captions.
    """

    step: Tensor

    def __init__(
        self, generator: Generator, discriminator: Discriminator, rate: Rate, *, reward: RewardConfig, policy: PolicyConfig,
        is_bf16: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.rate, self.reward, self.policy, self.is_bf16 = rate, reward, policy, is_bf16
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """The sum of both losses (its mean over ranks is that of the whole batch), and every reward by itself."""
        if self.training:
            self.step += 1
        with precision(batch["image"].device, is_bf16=self.is_bf16):
            drawn, log_prob_BJ = self._draw(batch["embedding"])
            texts = self.generator.lm.decode_texts(drawn)
            reward_BJ, figures = self._rate(batch["key"], batch["image"], texts)
            baseline_BJ = self._baseline(batch, reward_BJ)
            policy_loss = self_critical_loss(log_prob_BJ, reward_BJ - baseline_BJ)
            judged, discriminator_loss = self._discriminate(batch["text"], [text for of_image in texts for text in of_image])
        loss = policy_loss + discriminator_loss
        lengths = {"num_tokens": drawn.length_NJ.float().mean(), "ended_share": self._ended_share(drawn)}
        figures = {**figures, "reward": reward_BJ.mean(), "baseline": baseline_BJ.mean(), **judged, **lengths}
        losses = {"policy_loss": policy_loss.detach(), "discriminator_loss": discriminator_loss.detach()}
        return loss, {"loss": loss.detach(), **losses, **figures}

    def _draw(self, embedding_BE: Tensor) -> tuple[Generated, Tensor]:
        """J captions of each image and BJ, with gradient: the mean log-probability of their tokens, the end counted."""
        num, max_tokens = self.policy.num_samples, self.policy.max_tokens
        config = GenerationConfig(method="top_p", top_p=1.0, num_return=num, max_tokens=max_tokens)
        with evaluating(self.generator):
            drawn = self.generator.write(embedding_BE, config)
            length_N, embedding_NE = drawn.length_NJ.flatten(), embedding_BE.repeat_interleave(num, 0)
            log_prob_NT = self.generator.log_probs(embedding_NE, drawn.token_NJT.flatten(0, 1), length_N)
        return drawn, (log_prob_NT.sum(1) / length_N).view(-1, num)

    @torch.no_grad()
    def _rate(self, keys: Sequence[str], image_BE: Tensor, texts: list[list[str]]) -> tuple[Tensor, Metrics]:
        """BJ rewards, and the terms that they are made of. Both are computed at every rho, so that the log has them."""
        rho = self.reward.rho_at(int(self.step))
        semantic_BJ = self.rate(keys, image_BE, texts).to(image_BE.device)
        with evaluating(self.discriminator):
            natural_BJ = self.discriminator([text for of_image in texts for text in of_image]).view_as(semantic_BJ)
        reward_BJ = rho * self.reward.semantic_scale * semantic_BJ + (1 - rho) * natural_BJ
        terms = {"semantic": semantic_BJ.mean(), "natural": natural_BJ.mean(), "rho": semantic_BJ.new_tensor(rho)}
        return reward_BJ, terms

    def _baseline(self, batch: dict[str, Any], reward_BJ: Tensor) -> Tensor:
        if self.policy.baseline == "mean":
            return mean_of_others(reward_BJ)
        with evaluating(self.generator):
            greedy = self.generator.write(batch["embedding"], GenerationConfig(max_tokens=self.policy.max_tokens))
        return self._rate(batch["key"], batch["image"], self.generator.lm.decode_texts(greedy))[0].expand_as(reward_BJ)

    def _discriminate(self, real: list[str], written: list[str]) -> tuple[Metrics, Tensor]:
        """Half of the loss is of people's sentences, however many captions there are."""
        real_N, written_N = self.discriminator(real), self.discriminator(written)
        loss = F.binary_cross_entropy_with_logits(real_N, torch.ones_like(real_N)) / 2
        loss = loss + F.binary_cross_entropy_with_logits(written_N, torch.zeros_like(written_N)) / 2
        return {"real_prob": real_N.detach().sigmoid().mean(), "written_prob": written_N.detach().sigmoid().mean()}, loss

    def _ended_share(self, drawn: Generated) -> Tensor:
        return (drawn.token_NJT == self.generator.lm.eos).any(-1).float().mean()
