"""Experiments of the captioners that are fitted without gradients, SITTA and ReCap: from an embedding store to a folder."""

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from typing_extensions import Self

from sycoca.captioners.alignment import fit_image_to_text
from sycoca.captioners.captioner import LightCaptioner, write_fit
from sycoca.captioners.embeddings import EmbeddingStore, Reading, embed_shards
from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.captioners.recap import ReCap, ReCapConfig, build_recap, fit_its_space
from sycoca.captioners.recap_augmentation import AugmentationConfig, augment
from sycoca.captioners.sitta import Sitta, SittaConfig
from sycoca.captioners.sitta_maps import build_vocabulary, fit_token_map
from sycoca.captioners.sitta_report import compare_maps
from sycoca.config import Config, dump_config
from sycoca.distributed import world_size
from sycoca.evaluation.caption_metrics import score_captions
from sycoca.types import ConfigError


class PairsConfig(Config):
    """Embedded images with their captions (tools/embed.py); named shards that are not in the store yet are embedded first."""

    store: str
    split: str = "train"
    shards: list[str] = []
    held_out: str | None = None
    """A split that fitting never sees, to measure on."""
    held_out_shards: list[str] = []
    batch_size: int = Field(default=64, ge=1)
    num_workers: int = Field(default=2, ge=0)

    def open(self, encoder: FrozenEncoder) -> EmbeddingStore:
        """The training pairs. Raises DataError for another encoder's store, or an empty one."""
        for shards, split in ((self.shards, self.split), (self.held_out_shards, self.held_out)):
            if shards and split is not None:
                embed_shards(encoder, Path(self.store), Reading(shards, split, self.batch_size, self.num_workers))
        store = EmbeddingStore(Path(self.store), self.split)
        store.check_encoder(encoder.fingerprint)
        return store

    def open_held_out(self) -> EmbeddingStore:
        """The held-out pairs, after `open`, where they are named. Raises DataError where there are none of that name."""
        assert self.held_out is not None, "the caller checks whether there is a held-out split"
        return EmbeddingStore(Path(self.store), self.held_out)


class ClosedFormConfig(Config):
    """What SITTA and ReCap have in common."""

    folder: str
    """Where the captioner is saved."""
    encoder: str
    """As `load_encoder` takes it."""
    pairs: PairsConfig


class JudgedAugmentation(AugmentationConfig):
    """The loop with its judge, a metric of captions against the held-out references, and so another than its filter."""

    judge: Literal["CIDEr", "BLEU-4", "ROUGE-L"] = "CIDEr"
    num_judged: int | None = Field(default=None, ge=1)
    """Held-out images, the first ones; null: all of them."""


class ReCapFit(ClosedFormConfig):
    """One experiment."""

    captioner: ReCapConfig
    augmentation: JudgedAugmentation | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.augmentation is not None and self.pairs.held_out is None:
            raise ValueError("augmentation stops by its score on held-out pairs; name their split, pairs.held_out")
        return self


class SittaFit(ClosedFormConfig):
    """One experiment."""

    captioner: SittaConfig


def fit_sitta(config: SittaFit) -> dict[str, Any]:
    """The map to the language model's vocabulary; with a held-out split also `token_ndcg` of it and its controls.

    Raises DataError, ConfigError, CheckpointError.
    """
    device = find_only_device()
    encoder = load_encoder(config.encoder, device)
    train, lm = config.pairs.open(encoder), config.captioner.lm.load(device)
    started = time.perf_counter()
    vocabulary = build_vocabulary(lm, train, config.captioner.token_map)
    token_map = fit_token_map(encoder, train, vocabulary, config.captioner.token_map)
    map_seconds = time.perf_counter() - started
    needs_chooser = config.captioner.choose_by == "aCLIP-S"
    chooser = fit_image_to_text(train, config.captioner.alignment) if needs_chooser else None
    sitta = Sitta(encoder, vocabulary, token_map, chooser, config.captioner)
    figures: dict[str, Any] = {"fit_seconds": time.perf_counter() - started, "map_seconds": map_seconds}
    if config.pairs.held_out is not None:
        held_out = config.pairs.open_held_out()
        figures["token_ndcg"] = compare_maps(encoder, train, held_out, vocabulary, config.captioner.token_map)
    return finish(sitta, config, {**figures, "num_pairs": token_map.num_pairs})


def fit_recap(config: ReCapFit) -> dict[str, Any]:
    """Map, datastore and captioner of the training pairs. Raises DataError, ConfigError, CheckpointError."""
    device = find_only_device()
    encoder = load_encoder(config.encoder, device)
    train, lm = config.pairs.open(encoder), config.captioner.lm.load(device)
    started = time.perf_counter()
    aligner = fit_its_space(train, config.captioner)
    map_seconds = time.perf_counter() - started
    recap = build_recap(encoder, lm, train, aligner, config.captioner)
    if config.augmentation is not None:
        judge = partial(judge_captions, config.pairs.open_held_out(), config.augmentation)
        log = Path(config.folder) / "augmentation.jsonl"
        log.unlink(missing_ok=True)
        recap = augment(recap, train, config.augmentation, judge=judge, log=log)
    figures = {"fit_seconds": time.perf_counter() - started, "map_seconds": map_seconds}
    found = recap.retriever
    return finish(recap, config, {**figures, "num_pairs": found.aligner.num_pairs, "num_rows": len(found.datastore)})


def judge_captions(held_out: EmbeddingStore, config: JudgedAugmentation, recap: ReCap) -> float:
    """The judge's score, times 100, of what the captioner writes for held-out images."""
    references: dict[str, list[str]] = {}
    for block in held_out.blocks():
        for image, text in zip(block.image_of_text_N.tolist(), block.texts, strict=True):
            references.setdefault(block.keys[image], []).append(text)
    keys = [key for key in held_out.keys if key in references][: config.num_judged]
    predictions: dict[str, str] = {}
    for start in range(0, len(keys), config.batch_size):
        part = keys[start : start + config.batch_size]
        written = recap.write(held_out.image_rows([held_out.row_of_key[key] for key in part]), part)
        predictions |= {key: row.caption for key, row in zip(part, written, strict=True)}
    return score_captions(predictions, references).corpus[config.judge]


def find_device() -> torch.device:
    """Where encoder and language model run; starts the process group where this is one of several processes."""
    return Accelerator(cpu=not torch.cuda.is_available()).device


def find_only_device() -> torch.device:
    """The same of a process that is alone. Raises ConfigError where it is one of several: a closed form has no use for them."""
    device = find_device()
    if world_size() > 1:
        raise ConfigError(
            f"this captioner is fitted in closed form by one process, and {world_size()} were launched; several can embed the "
            "images first (tools/embed.py), and evaluate"
        )
    return device


def finish(captioner: LightCaptioner, config: ClosedFormConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """Save the captioner, the experiment beside it, and what fitting took: with embeddings at hand, loading not counted."""
    folder = Path(config.folder)
    captioner.save(folder)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_fit(folder, figures)
    return {"captioner": str(folder), **figures}
