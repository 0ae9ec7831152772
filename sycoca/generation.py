"""Choosing tokens: greedy, beam search and nucleus sampling for any model that can name the next token's logits.

The model is a step function with its own state (a key-value cache), `next_logits(token_NT, source_N) -> logit_NV`:
called first with the whole prompt, then with the one token chosen for each row. `source_N` names, for each row now,
the row of the call before that it continues; None says the same rows in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from pydantic import Field, model_validator
from torch import Tensor

from sycoca.config import Config

NextLogits = Callable[[Tensor, Tensor | None], Tensor]


class GenerationConfig(Config):
    """How captions are chosen; `num_beams` is read by beam search only, `top_p` and `temperature` by sampling only."""

    method: Literal["greedy", "beam", "top_p"] = "greedy"
    max_tokens: int = Field(default=40, ge=1)
    """New tokens at most, eos counted, the prompt not."""
    min_tokens: int = Field(default=0, ge=0)
    """New tokens before eos is allowed."""
    num_beams: int = Field(default=4, ge=1)
    length_penalty: float = 1.0
    """A candidate's score is its summed log-probability / length ** length_penalty; above 0 favours longer captions."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    repetition_penalty: float = Field(default=1.0, ge=1)
    """Factor on the log-probability of tokens already chosen (CTRL, arXiv:1909.05858, section 4.1); 1 is off."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """Length of the n-grams of new tokens that may not occur twice; 0 is off."""
    num_return: int = Field(default=1, ge=1)
    """Candidates for each row of the prompt."""
    stop_early: bool = True
    """False calls the model exactly `max_tokens` times: for ranks that must stay in step (ZeRO-3 gathers weights at a call)."""

    @model_validator(mode="after")
    def _check(self) -> "GenerationConfig":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens = {self.max_tokens}")
        if self.method == "greedy" and self.num_return > 1:
            raise ValueError(f"greedy search gives one candidate, num_return is {self.num_return}; use beam or top_p")
        if self.method == "beam" and self.num_return > self.num_beams:
            raise ValueError(f"num_return is {self.num_return}, more than num_beams = {self.num_beams}")
        return self


@dataclass(frozen=True, slots=True)
class Generated:
    """The chosen tokens, without the prompt; J candidates for each row, the best first in beam search."""

    token_NJT: Tensor
    """int64; after a candidate's eos, eos again."""
    length_NJ: Tensor
    """Tokens chosen, eos counted; a candidate that reached `max_tokens` may have no eos."""
    log_prob_NJT: Tensor
    """Of each chosen token in the model's own distribution, before penalties, temperature and truncation; 0 after eos."""
    score_NJ: Tensor
    """Summed log-probability / length ** length_penalty; beam search sums penalised log-probabilities, which it ranks by,
    and gives -inf where the model has fewer than `num_return` possible captions."""


@torch.no_grad()
def decode(
    next_logits: NextLogits,
    prompt_NT: Tensor,
    config: GenerationConfig,
    *,
    eos: int,
    generator: torch.Generator | None = None,
) -> Generated:
    """Continue each row of the prompt until `eos` or `config.max_tokens`; on the prompt's device, without gradient.

    `generator` (on the same device) seeds `top_p`; rows are independent of each other in greedy and beam search. Penalties
    look at new tokens only, so a prompt may be copied from. `T` of the result is the longest candidate's length, or
    `max_tokens` without `stop_early`.
    """
    assert prompt_NT.ndim == 2, f"expected a prompt of rows and tokens, found the shape {tuple(prompt_NT.shape)}"
    if config.method == "beam":
        generated = _search_beams(next_logits, prompt_NT, config, eos=eos)
    else:
        generated = _extend_rows(next_logits, prompt_NT, config, eos=eos, generator=generator)
    num_steps = int(generated.length_NJ.max()) if config.stop_early and prompt_NT.shape[0] > 0 else config.max_tokens
    return Generated(
        token_NJT=generated.token_NJT[..., :num_steps],
        length_NJ=generated.length_NJ,
        log_prob_NJT=generated.log_prob_NJT[..., :num_steps],
        score_NJ=generated.score_NJ,
    )


def _extend_rows(
    next_logits: NextLogits, prompt_NT: Tensor, config: GenerationConfig, *, eos: int, generator: torch.Generator | None
) -> Generated:
    """Greedy and top-p: every row takes one token a step and never looks at another."""
    num_candidates = config.num_return
    source_N = torch.arange(prompt_NT.shape[0], device=prompt_NT.device).repeat_interleave(num_candidates)
    logit_NV = next_logits(prompt_NT, None)[source_N]
    token_NT = prompt_NT.new_full((source_N.numel(), config.max_tokens), eos)
    log_prob_NT = torch.zeros(token_NT.shape, device=prompt_NT.device)
    is_finished_N = torch.zeros_like(source_N, dtype=torch.bool)
    length_N = torch.zeros_like(source_N)
    for step in range(config.max_tokens):
        log_prob_NV = logit_NV.float().log_softmax(-1)
        penalised_NV = _penalise(log_prob_NV, token_NT[:, :step], config, eos=eos)
        chosen_N = penalised_NV.argmax(-1) if config.method == "greedy" else _sample(penalised_NV, config, generator=generator)
        chosen_N = chosen_N.masked_fill(is_finished_N, eos)
        token_NT[:, step] = chosen_N
        log_prob_N = log_prob_NV.gather(1, chosen_N[:, None]).squeeze(1)
        log_prob_NT[:, step] = log_prob_N.masked_fill(is_finished_N, 0.0)
        length_N += ~is_finished_N
        is_finished_N |= chosen_N == eos
        if step + 1 == config.max_tokens or (config.stop_early and bool(is_finished_N.all())):
            break
        logit_NV = next_logits(chosen_N[:, None], source_N if step == 0 and num_candidates > 1 else None)
    return Generated(
        token_NJT=rearrange(token_NT, "(n j) t -> n j t", j=num_candidates),
        length_NJ=rearrange(length_N, "(n j) -> n j", j=num_candidates),
        log_prob_NJT=rearrange(log_prob_NT, "(n j) t -> n j t", j=num_candidates),
        score_NJ=rearrange(log_prob_NT.sum(1) / length_N**config.length_penalty, "(n j) -> n j", j=num_candidates),
    )


def _sample(log_prob_NV: Tensor, config: GenerationConfig, *, generator: torch.Generator | None) -> Tensor:
    """One token a row from the nucleus: the fewest tokens that together hold `top_p` (Holtzman et al., arXiv:1904.09751)."""
    prob_NV, token_NV = (log_prob_NV / config.temperature).softmax(-1).sort(dim=-1, descending=True)
    is_outside_NV = prob_NV.cumsum(-1) - prob_NV >= config.top_p
    place_N1 = torch.multinomial(prob_NV.masked_fill(is_outside_NV, 0.0), num_samples=1, generator=generator)
    return token_NV.gather(1, place_N1).squeeze(1)


def _penalise(log_prob_NV: Tensor, token_NT: Tensor, config: GenerationConfig, *, eos: int) -> Tensor:
    """Log-probabilities, no longer normalised, after the rules on repetition and on the least length."""
    penalised_NV = log_prob_NV
    if config.repetition_penalty > 1:
        is_chosen_NV = torch.zeros_like(log_prob_NV, dtype=torch.bool).scatter_(1, token_NT, True)
        # on log-probabilities, not logits: the result does not depend on a constant added to all logits
        penalised_NV = torch.where(is_chosen_NV, penalised_NV * config.repetition_penalty, penalised_NV)
    if 0 < config.no_repeat_ngram <= token_NT.shape[1]:
        is_repeat_NV = _ends_repeated_ngram(token_NT, config.no_repeat_ngram, num_tokens=log_prob_NV.shape[1])
        is_repeat_NV[:, eos] = False
        penalised_NV = penalised_NV.masked_fill(is_repeat_NV, -torch.inf)
    if token_NT.shape[1] < config.min_tokens:
        penalised_NV = penalised_NV.index_fill(1, torch.tensor([eos], device=log_prob_NV.device), -torch.inf)
    return penalised_NV


def _ends_repeated_ngram(token_NT: Tensor, size: int, *, num_tokens: int) -> Tensor:
    """NV: whether the token, put after the row, would end an n-gram that the row already has."""
    ngram_NTn = token_NT.unfold(1, size, 1)
    tail_N1n = token_NT[:, None, token_NT.shape[1] - size + 1 :]
    is_match_NT = (ngram_NTn[..., :-1] == tail_N1n).all(-1)
    ending_NT = ngram_NTn[..., -1].masked_fill(~is_match_NT, num_tokens)  # one column more, for no token at all
    is_repeat_NV = torch.zeros((token_NT.shape[0], num_tokens + 1), dtype=torch.bool, device=token_NT.device)
    return is_repeat_NV.scatter_(1, ending_NT, True)[:, :num_tokens]


def _search_beams(next_logits: NextLogits, prompt_NT: Tensor, config: GenerationConfig, *, eos: int) -> Generated:
    """Beam search with `num_beams` live beams and a pool of as many finished ones.

    An eos finishes a beam if it is among the best `num_beams` continuations. A row ends when `num_beams` have finished and no
    live beam scores above the worst of them: ending at their number alone would let short captions shut out a better longer
    one. At `max_tokens` live beams join the pool. So one beam is greedy search, and enough beams search everything.
    """
    num_rows, num_beams = prompt_NT.shape[0], config.num_beams
    logit_NV = repeat(next_logits(prompt_NT, None), "n v -> (n j) v", j=num_beams)
    live, pool = _empty_beams(prompt_NT, config, eos=eos), _empty_beams(prompt_NT, config, eos=eos)
    live.score_NJ[:, 0] = 0.0  # all beams start alike: one of them speaks for all
    is_open_N1 = torch.ones((num_rows, 1), dtype=torch.bool, device=prompt_NT.device)
    first_N1 = torch.arange(num_rows, device=prompt_NT.device)[:, None]
    for step in range(config.max_tokens):
        grown, beam_NJ = _grow(live, logit_NV, config, step=step, eos=eos)
        ends_NJ = grown.token_NJT[..., step] == eos
        is_finished_NJ = ends_NJ & is_open_N1 & grown.score_NJ.isfinite()
        is_finished_NJ[:, num_beams:] = False
        pool = _best(_joined(pool, _ranked(grown, is_finished_NJ, config)), num_beams)[0]
        live, place_NJ = _best(_kept(grown, ~ends_NJ), num_beams)
        best_live_N1 = live.score_NJ[:, :1] / (step + 1) ** config.length_penalty
        is_open_N1 &= best_live_N1 > pool.score_NJ[:, -1:]
        if step + 1 == config.max_tokens or (config.stop_early and not bool(is_open_N1.any())):
            break
        beam_NJ = beam_NJ.gather(1, place_NJ)
        source_NJ = first_N1 * num_beams + beam_NJ if step > 0 else first_N1.expand(num_rows, num_beams)
        logit_NV = next_logits(rearrange(live.token_NJT[..., step], "n j -> (n j) 1"), source_NJ.reshape(-1))
    return _best(_joined(pool, _ranked(live, is_open_N1.expand(num_rows, num_beams), config)), config.num_return)[0]


def _empty_beams(prompt_NT: Tensor, config: GenerationConfig, *, eos: int) -> Generated:
    shape = (prompt_NT.shape[0], config.num_beams)
    return Generated(
        token_NJT=prompt_NT.new_full((*shape, config.max_tokens), eos),
        length_NJ=prompt_NT.new_zeros(shape),
        log_prob_NJT=torch.zeros((*shape, config.max_tokens), device=prompt_NT.device),
        score_NJ=torch.full(shape, -torch.inf, device=prompt_NT.device),
    )


def _grow(live: Generated, logit_NV: Tensor, config: GenerationConfig, *, step: int, eos: int) -> tuple[Generated, Tensor]:
    """The best 2 * num_beams continuations of each row, best first, and the beam that each came from.

    Twice as many as beams: at most one continuation of each beam is eos, so `num_beams` that go on are always among them.
    """
    num_beams = config.num_beams
    log_prob_NV = logit_NV.float().log_softmax(-1)
    chosen_NT = rearrange(live.token_NJT[..., :step], "n j t -> (n j) t")
    penalised_NV = _penalise(log_prob_NV, chosen_NT, config, eos=eos)
    num_tokens = log_prob_NV.shape[1]
    total_NV = rearrange(penalised_NV, "(n j) v -> n j v", j=num_beams) + live.score_NJ[..., None]
    score_NJ, place_NJ = total_NV.flatten(1).topk(2 * num_beams, dim=1)
    beam_NJ = place_NJ // num_tokens
    grown = _taken(live, beam_NJ)
    grown.token_NJT[..., step] = place_NJ % num_tokens
    grown.log_prob_NJT[..., step] = rearrange(log_prob_NV, "(n j) v -> n (j v)", j=num_beams).gather(1, place_NJ)
    return Generated(grown.token_NJT, grown.length_NJ + 1, grown.log_prob_NJT, score_NJ), beam_NJ


def _ranked(beams: Generated, is_kept_NJ: Tensor, config: GenerationConfig) -> Generated:
    """The kept beams with the length penalty in their score; the others at -inf."""
    score_NJ = beams.score_NJ / beams.length_NJ**config.length_penalty
    return _kept(Generated(beams.token_NJT, beams.length_NJ, beams.log_prob_NJT, score_NJ), is_kept_NJ)


def _kept(beams: Generated, is_kept_NJ: Tensor) -> Generated:
    score_NJ = beams.score_NJ.masked_fill(~is_kept_NJ, -torch.inf)
    return Generated(beams.token_NJT, beams.length_NJ, beams.log_prob_NJT, score_NJ)


def _joined(first: Generated, second: Generated) -> Generated:
    return Generated(
        token_NJT=torch.cat([first.token_NJT, second.token_NJT], 1),
        length_NJ=torch.cat([first.length_NJ, second.length_NJ], 1),
        log_prob_NJT=torch.cat([first.log_prob_NJT, second.log_prob_NJT], 1),
        score_NJ=torch.cat([first.score_NJ, second.score_NJ], 1),
    )


def _best(beams: Generated, num: int) -> tuple[Generated, Tensor]:
    place_NJ = beams.score_NJ.topk(num, dim=1).indices
    return _taken(beams, place_NJ), place_NJ


def _taken(beams: Generated, place_NJ: Tensor) -> Generated:
    place_NJT = place_NJ[..., None].expand(-1, -1, beams.token_NJT.shape[2])
    return Generated(
        token_NJT=beams.token_NJT.gather(1, place_NJT),
        length_NJ=beams.length_NJ.gather(1, place_NJ),
        log_prob_NJT=beams.log_prob_NJT.gather(1, place_NJT),
        score_NJ=beams.score_NJ.gather(1, place_NJ),
    )
