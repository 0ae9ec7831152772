"""Choosing a checkpoint without pairs: captions near their images, made of what the corpus says."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sycoca.finetune.text_rewards import Rate

UNPAIRED = "unpaired"
"""The figure: the mean semantic reward, times the share of the captions' word pairs that the corpus has, which falls where a
reward is won by words that nobody puts beside each other. (The discriminator changes and cannot compare checkpoints.)"""
_PREFIX, _HELD_OUT = "eval/", "held out"

_START, _END = "<start>", "<end>"


class Unpaired:
    """Measures captions of held-out images against a reward and a corpus."""

    def __init__(self, rate: Rate, corpus: Iterable[str]):
        self._rate = rate
        self._known = {pair for text in corpus for pair in _word_pairs(text)}

    def seen_share(self, captions: Sequence[str]) -> float:
        """Of all word pairs of the captions, beginning and end counted as words, how many the corpus has."""
        pairs = [pair for caption in captions for pair in _word_pairs(caption)]
        return sum(pair in self._known for pair in pairs) / len(pairs)

    def measure(self, keys: Sequence[str], image_BE: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """`semantic`, `seen_share` and their product."""
        names = [f"{_HELD_OUT}/{key}" for key in keys]  # a reward may remember training images of the same names
        semantic = self._rate(names, image_BE, [[caption] for caption in captions]).mean().item()
        seen = self.seen_share(captions)
        return {"semantic": semantic, "seen_share": seen, UNPAIRED: semantic * seen}


def report_selections(log: Path, criteria: Mapping[str, str]) -> dict[str, Any]:
    """For each criterion the evaluation of a run that it chooses, with its step and all its figures; none without one.

    Where the log goes back to an earlier step, from a checkpoint or from the start, what it had of later steps does not count.
    """
    evaluations: list[dict[str, Any]] = []
    for line in map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.is_file() else []):
        is_evaluation = any(name.startswith(_PREFIX) for name in line)
        first_undone = line["step"] + (not is_evaluation)
        evaluations = [figures for figures in evaluations if figures["step"] < first_undone]
        if is_evaluation:
            evaluations.append(_figures(line))
    return {
        name: max(evaluations, key=lambda figures: figures[figure]) for name, figure in criteria.items() if evaluations
    }


def _figures(line: dict[str, Any]) -> dict[str, Any]:
    return {"step": line["step"], **{k.removeprefix(_PREFIX): v for k, v in line.items() if k.startswith(_PREFIX)}}


def _word_pairs(text: str) -> list[tuple[str, str]]:
    words = [_START, *text.split(), _END]
    return list(pairwise(words))
