"""Self-critical training: its gradient against a plain loop over drawn captions, and what it makes more probable."""

from typing import Any, Literal

import pytest
import torch
from builders import BOS, EOS, MAX_TOKENS, build_batch, build_model, gradients, run_backward
from pydantic import ValidationError
from torch import Tensor

from sycoca.finetune.self_critical import SelfCriticalConfig, SelfCriticalTask, mean_of_others, self_critical_loss
from sycoca.models.decoding import CaptionStep
from sycoca.types import Batch

NUM_SAMPLES = 3
FAVOURITE = 11


class Numbers:
    """A tokenizer whose words are the ids themselves."""

    bos, eos = BOS, EOS

    def decode(self, ids: list[int]) -> str:
        kept = ids[: ids.index(EOS)] if EOS in ids else ids
        return " ".join(map(str, kept))


class KnownReward:
    """A function of words, image and end; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bool]] = []

    def __call__(self, caption: str, key: str, *, is_ended: bool) -> float:
        self.asked.append((caption, key, is_ended))
        return reward_of(caption, key, is_ended)


def reward_of(caption: str, key: str, is_ended: bool) -> float:
    words = [int(word) for word in caption.split()]
    return sum(word % 5 for word in words) / 7 + len(words) * int(key[-1]) / 3 + is_ended


def make_task(reward: Any, *, is_bf16: bool = False, **settings: Any) -> SelfCriticalTask:
    changes = {name: settings.pop(name) for name in ("recompute", "text", "text_decoder", "vision") if name in settings}
    config = SelfCriticalConfig(**{"num_samples": NUM_SAMPLES, "max_tokens": MAX_TOKENS - 2, **settings})
    model = build_model({"text", "text_decoder"}, **changes)
    return SelfCriticalTask(model, Numbers(), config, reward, is_bf16=is_bf16).train()  # pyright: ignore


def log_prob_by_loop(task: SelfCriticalTask, batch: Batch, row: int, caption: str, is_ended: bool) -> Tensor:
    """Token by token, each with a forward pass of its own over everything before it."""
    patch_BPD, _ = task.model.vision(batch["image"][row : row + 1])
    tokens, total = [BOS], torch.zeros(())
    for chosen in [*map(int, caption.split()), *[EOS] * is_ended]:
        token_BL = torch.tensor([tokens])
        token_BLD, _ = task.model.text(token_BL, torch.tensor([len(tokens)]))
        logit_V = task.model.text_decoder(token_BLD, patch_BPD)[0, -1]
        total = total + logit_V.log_softmax(-1)[chosen]
        tokens.append(chosen)
    return total


def expected_loss(task: SelfCriticalTask, batch: Batch, asked: list[tuple[str, str, bool]]) -> Tensor:
    """REINFORCE, one caption after another, from what the reward was asked."""
    size = len(batch["key"])
    drawn, greedy = asked[: size * NUM_SAMPLES], asked[size * NUM_SAMPLES :]
    total = torch.zeros(())
    for place, (caption, key, is_ended) in enumerate(drawn):
        row = place // NUM_SAMPLES
        assert key == batch["key"][row]
        if greedy:
            baseline = reward_of(*greedy[row])
        else:
            others = [drawn[row * NUM_SAMPLES + j] for j in range(NUM_SAMPLES) if row * NUM_SAMPLES + j != place]
            baseline = sum(reward_of(*other) for other in others) / (NUM_SAMPLES - 1)
        advantage = reward_of(caption, key, is_ended) - baseline
        total = total - advantage * log_prob_by_loop(task, batch, row, caption, is_ended)
    return total / (size * NUM_SAMPLES)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("baseline", ["greedy", "mean"])
def test_the_gradient_is_that_of_reinforce_by_a_plain_loop(baseline: Literal["greedy", "mean"], recompute: bool):
    reward, batch = KnownReward(), build_batch()
    task = make_task(reward, baseline=baseline, recompute=recompute)
    loss, found = run_backward(task, batch)
    assert len({caption for caption, _, _ in reward.asked}) > NUM_SAMPLES
    assert {is_ended for _, _, is_ended in reward.asked} == {False, True}
    task.zero_grad()
    expected = expected_loss(task, batch, reward.asked)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(task).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_drawing_pass_leaves_no_weight_without_gradient_in_bf16():
    """Autocast keeps the weights that it cast; torch before 2.11 gave those cast without gradient to the pass with it."""
    _, found = run_backward(make_task(KnownReward(), is_bf16=True), build_batch())
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "norm" in name or "qkv.weight" in name)


def test_what_the_reward_favours_becomes_more_probable():
    batch = build_batch()

    def favours(caption: str, key: str, *, is_ended: bool) -> float:
        return float(str(FAVOURITE) in caption.split())

    task = make_task(favours, num_samples=8)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.5)
    before = prob_first(task, batch)
    torch.manual_seed(3)
    for _ in range(15):
        optimizer.zero_grad()
        task(batch)[0].backward()
        optimizer.step()
    assert (prob_first(task, batch) > 2 * before).all()


@torch.no_grad()
def prob_first(task: SelfCriticalTask, batch: Batch) -> Tensor:
    """B: probability of the favourite as the first word."""
    patch_BPD, _ = task.model.vision(batch["image"])
    step = CaptionStep(task.model.eval(), patch_BPD)
    prob_B = step(torch.full((len(batch["key"]), 1), BOS), None).softmax(-1)[:, FAVOURITE]
    task.train()
    return prob_B


def test_the_same_seed_draws_the_same_captions_and_another_draws_others():
    rewards = [KnownReward() for _ in range(3)]
    for reward, seed in zip(rewards, [5, 5, 6]):
        run_backward(make_task(reward), build_batch(), seed=seed)
    assert rewards[0].asked == rewards[1].asked != rewards[2].asked


def test_captions_are_drawn_without_dropout():
    noisy = {"text_decoder": {"num_layers": 2, "dropout": 0.9}}
    asked = []
    for changes in ({}, noisy):
        reward = KnownReward()
        run_backward(make_task(reward, **changes), build_batch())
        asked.append(reward.asked)
    assert asked[0] == asked[1]


def test_the_batch_s_own_captions_are_not_read():
    batch, other = build_batch(), build_batch()
    other["token"] = other["token"].flip(0)
    assert run_backward(make_task(KnownReward()), batch)[0] == run_backward(make_task(KnownReward()), other)[0]


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch():
    log_prob_BJ, advantage_BJ = torch.randn(4, NUM_SAMPLES), torch.randn(4, NUM_SAMPLES)
    halves = [self_critical_loss(log_prob_BJ[rows], advantage_BJ[rows]) for rows in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, self_critical_loss(log_prob_BJ, advantage_BJ))


def test_the_mean_baseline_leaves_the_caption_itself_out():
    assert mean_of_others(torch.tensor([[1.0, 2.0, 6.0]])).tolist() == [[4.0, 3.5, 1.5]]


def test_one_caption_cannot_be_compared_with_the_mean_of_others():
    with pytest.raises(ValidationError, match="num_samples to 2 or more"):
        SelfCriticalConfig(baseline="mean", num_samples=1)
