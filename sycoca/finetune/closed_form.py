"""Experiments of the captioners that are fitted without gradients, SITTA and ReCap: from an embedding store to a folder."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field

from sycoca.captioners.captioner import LightCaptioner, write_fit
from sycoca.captioners.embeddings import EmbeddingStore, Reading, embed_shards
from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.captioners.recap import ReCapConfig, build_recap, fit_space
from sycoca.config import Config, dump_config
from sycoca.distributed import rank


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


class ClosedFormConfig(Config):
    """What SITTA and ReCap have in common."""

    folder: str
    """Where the captioner is saved."""
    encoder: str
    """As `load_encoder` takes it."""
    pairs: PairsConfig


class ReCapFit(ClosedFormConfig):
    """One experiment."""

    captioner: ReCapConfig


def fit_recap(config: ReCapFit) -> dict[str, Any]:
    """Map, datastore and captioner of the training pairs. Raises DataError, ConfigError, CheckpointError."""
    device = find_device()
    encoder = load_encoder(config.encoder, device)
    train, lm = config.pairs.open(encoder), config.captioner.lm.load(device)
    started = time.perf_counter()
    aligner = fit_space(train, config.captioner)
    map_seconds = time.perf_counter() - started
    recap = build_recap(encoder, lm, train, aligner, config.captioner)
    fit_seconds = time.perf_counter() - started
    return finish(recap, config, {"fit_seconds": fit_seconds, "map_seconds": map_seconds, "num_pairs": aligner.num_pairs})


def find_device() -> torch.device:
    """Where encoder and language model run; starts the process group where this is one of several processes."""
    return Accelerator(cpu=not torch.cuda.is_available()).device


def finish(captioner: LightCaptioner, config: ClosedFormConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """Save the captioner, the experiment beside it, and what fitting took: with embeddings at hand, loading not counted."""
    folder = Path(config.folder)
    if rank() == 0:
        captioner.save(folder)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_fit(folder, figures)
    return {"captioner": str(folder), **figures}
