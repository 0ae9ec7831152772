"""ReCap's datastore augmentation loop: captions that it writes itself join the human ones where they fit their images.

A round writes captions for training images, keeps those whose metric is at least the mean of the human captions, adds them to
datastore and pairs, and fits the map again. It ends where a judge, who is not the metric, sees no more gain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sycoca.captioners.datastore_files import rows_of_store
from sycoca.captioners.embeddings import EmbeddedBlock, Pairs
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.recap import ReCap, fit_its_space
from sycoca.captioners.retriever import build_retriever
from sycoca.captioners.text_rows import Row, TextRows
from sycoca.config import Config
from sycoca.log import JsonlTracker, logger
from sycoca.similarity import clip_s, positive_cosine
from sycoca.types import DataError, image_of

Judge = Callable[[ReCap], float]
"""Measures a captioner on held-out images; more is better."""


class AugmentationConfig(Config):
    """What is added in a round, and how many rounds there are at most."""

    metric: Literal["aCLIP-S", "CLIP-S"] = "aCLIP-S"
    """Rates captions, human ones too; CLIP-S without words before the caption."""
    captions: Literal["generated", "random"] = "generated"
    """`random` is a control: as many captions for the same images, but each is a human one of another image."""
    max_rounds: int = Field(default=5, ge=1)
    num_images: int | None = Field(default=None, ge=1)
    """Training images that captions are written for, spread evenly; null: all of them."""
    batch_size: int = Field(default=64, ge=1)
    seed: int = 0
    """Of random captions."""


class Added(NamedTuple):
    """A synthetic caption of a training image."""

    image: int
    """Row among the images."""
    text: str
    score: float
    text_E: Tensor
    """Raw embedding."""


@dataclass(frozen=True)
class AugmentedPairs:
    """Training pairs with synthetic captions behind each block's human ones. Satisfies Pairs."""

    human: Pairs
    added: Sequence[Added]

    @property
    def split(self) -> str:
        """Of the human pairs."""
        return self.human.split

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.human.fingerprint

    @property
    def num_texts(self) -> int:
        """Human and synthetic captions."""
        return self.human.num_texts + len(self.added)

    @property
    def keys(self) -> list[str]:
        """The images' names, by row number."""
        return self.human.keys

    def __len__(self) -> int:
        return len(self.human)

    def image_rows(self, rows: Sequence[int], /) -> Tensor:
        """NE: images by row number."""
        return self.human.image_rows(rows)

    def blocks(self) -> Iterator[EmbeddedBlock]:
        """The human blocks with what was added to their images."""
        for start, block in number_blocks(self.human):
            mine = [item for item in self.added if start <= item.image < start + len(block.keys)]
            owner_N = torch.tensor([item.image - start for item in mine], dtype=torch.int64)
            text_NE = torch.stack([item.text_E for item in mine]) if mine else block.text_NE[:0]
            yield block._replace(
                texts=[*block.texts, *(item.text for item in mine)],
                text_NE=torch.cat([block.text_NE, text_NE]),
                image_of_text_N=torch.cat([block.image_of_text_N, owner_N]),
            )


def number_blocks(pairs: Pairs) -> Iterator[tuple[int, EmbeddedBlock]]:
    """Blocks, each with the row number of its first image."""
    start = 0
    for block in pairs.blocks():
        yield start, block
        start += len(block.keys)


def augment(recap: ReCap, train: Pairs, config: AugmentationConfig, *, judge: Judge, log: Path) -> ReCap:
    """The captioner of the best round, 0 being that without additions; every round adds a line to `log`.

    Raises DataError as fitting and retrieval do.
    """
    tracker = JsonlTracker(log)
    added: list[Added] = []
    best, best_score = recap, judge(recap)
    tracker.write(0, {"validation": best_score, "num_rows": len(recap.retriever.datastore)})
    for number in range(1, config.max_rounds + 1):
        written, figures = write_round(recap, train, config, known=added)
        if config.captions == "random":
            written = draw_others(written, train, seed=f"{config.seed}/{number}")
        added += written
        recap = refit(recap, AugmentedPairs(train, added))
        score = judge(recap)
        figures |= {"num_added": len(written), "num_rows": len(recap.retriever.datastore), "validation": score}
        tracker.write(number, figures)
        logger.info("round %d: %s", number, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if not written or score <= best_score:
            break
        best, best_score = recap, score
    tracker.close()
    return best


def write_round(
    recap: ReCap, train: Pairs, config: AugmentationConfig, *, known: Sequence[Added]
) -> tuple[list[Added], dict[str, float]]:
    """Captions of training images that reach the mean of the human ones and are new to their image, and the round's figures."""
    threshold = mean_human_score(recap.retriever.aligner, train, config)
    seen = {(image, text.lower()) for image, text in own_captions(train)} | {(item.image, item.text.lower()) for item in known}
    rows = range(0, len(train), max(1, len(train) // (config.num_images or len(train))))[: config.num_images]
    kept: list[Added] = []
    scores: list[float] = []
    for start in range(0, len(rows), config.batch_size):
        for item in write_captions(recap, train, rows[start : start + config.batch_size], config):
            scores.append(item.score)
            if item.score >= threshold and item.text and (item.image, item.text.lower()) not in seen:
                seen.add((item.image, item.text.lower()))
                kept.append(item)
    is_good = [score >= threshold for score in scores]
    mean = sum(scores) / len(scores)
    return kept, {"threshold": threshold, "mean": mean, "num_written": len(scores), "num_good": sum(is_good)}


def write_captions(recap: ReCap, train: Pairs, rows: Sequence[int], config: AugmentationConfig) -> list[Added]:
    """Every candidate for these training images, rated; nobody sees its own image's captions."""
    image_NE = train.image_rows(rows)
    written = recap.write(image_NE, [train.keys[row] for row in rows])
    owners = [place for place, of_image in enumerate(written) for _ in of_image.candidates]
    texts = [text for of_image in written for text in of_image.candidates]
    text_NE = recap.encoder.encode_text(texts).cpu()
    score_N = rate(config.metric, recap.retriever.aligner, image_NE[owners], text_NE)
    items = zip(owners, texts, score_N.tolist(), text_NE, strict=True)
    return [Added(rows[owner], text, score, text_E) for owner, text, score, text_E in items]


def mean_human_score(aligner: LinearAligner, train: Pairs, config: AugmentationConfig) -> float:
    """Of all human captions with their images."""
    scores = [
        rate(config.metric, aligner, block.image_NE[block.image_of_text_N], block.text_NE).double() for block in train.blocks()
    ]
    return torch.cat(scores).mean().item()


def rate(metric: str, aligner: LinearAligner, image_NE: Tensor, text_NE: Tensor) -> Tensor:
    """N: aCLIP-S or CLIP-S of raw embeddings, row by row."""
    if metric == "CLIP-S":
        return clip_s(image_NE, text_NE)
    return positive_cosine(aligner.apply(image_NE), aligner.embed_target(text_NE))


def draw_others(added: Sequence[Added], train: Pairs, *, seed: str) -> list[Added]:
    """In place of each caption a human one of another image, with a score that nothing has looked at."""
    generator = Random(seed)
    texts = [
        (image_of(block.keys[image]), text, text_E)
        for block in train.blocks()
        for image, text, text_E in zip(block.image_of_text_N.tolist(), block.texts, block.text_NE, strict=True)
    ]
    if len({source for source, _, _ in texts}) < 2:
        raise DataError("random captions are drawn of other images, and there is one image")
    drawn = []
    for item in added:
        source, text, text_E = generator.choice(texts)
        while source == image_of(train.keys[item.image]):
            source, text, text_E = generator.choice(texts)
        drawn.append(Added(item.image, text, float("nan"), text_E))
    return drawn


def own_captions(train: Pairs) -> Iterator[tuple[int, str]]:
    """Each human caption with its image's row."""
    for start, block in number_blocks(train):
        for image, text in zip(block.image_of_text_N.tolist(), block.texts, strict=True):
            yield start + image, text


def refit(recap: ReCap, pairs: AugmentedPairs) -> ReCap:
    """The same captioner with map and datastore of these pairs; synthetic rows say so, and keep their score."""
    config = recap.config
    human = rows_of_store(pairs.human)
    rows = [Row(item.text, image_of(pairs.keys[item.image]), pairs.split, "synthetic", item.score) for item in pairs.added]
    added_SE = [item.text_E.numpy()[None] for item in pairs.added]
    contents = TextRows([*human.rows, *rows], np.concatenate([human.embedding_SE, *added_SE]), human.fingerprint)
    retriever = build_retriever(recap.encoder, contents, fit_its_space(pairs, config), config, num=config.num_found)
    return type(recap)(recap.lm, retriever, config)
