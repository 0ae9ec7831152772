"""Aligners fitted from a store of planted pairs: held-out retrieval rises where it should, stays at chance where it must."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sycoca.captioners.alignment import AlignmentConfig, compare_spaces, fit_image_to_text, held_out_pairs
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.evaluation.retrieval import recall_metrics, retrieval_ranks
from sycoca.types import DataError

E, NUM_TRAIN, NUM_HELD_OUT = 12, 400, 150
CHANCE = 100 / NUM_HELD_OUT


def write_store(folder: Path, *, seed: int) -> Path:
    """Texts are images turned by a planted rotation, with noise and an offset; image i has 1 + i % 3 captions."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.standard_normal((E, E)))[0]
    offset = random.standard_normal((2, E))
    parts = [("train", NUM_TRAIN // 4, part) for part in range(4)] + [("val", NUM_HELD_OUT, 0)]
    for split, num, number in parts:
        path = folder / "parts" / f"{split}-{number}"
        path.mkdir(parents=True)
        image_NE = random.standard_normal((num, E))
        image_of_text_N = np.repeat(np.arange(num), 1 + np.arange(num) % 3)
        text_NE = (image_NE @ rotation)[image_of_text_N] + 0.15 * random.standard_normal((len(image_of_text_N), E))
        np.save(path / "images.npy", (image_NE + offset[0]).astype(np.float32))
        np.save(path / "texts.npy", (text_NE + offset[1]).astype(np.float32))
        np.save(path / "image_of_text.npy", image_of_text_N)
        keys = [f"{split}{number}/{row}" for row in range(num)]
        about = {"split": split, "shard": f"{number}.tar", "keys": keys, "texts": ["x"] * len(image_of_text_N)}
        (path / "rows.json").write_text(json.dumps(about))
    facts = {"kind": "embedding store", "encoder": "planted", "fingerprint": "planted", "embed_width": E}
    (folder / "meta.json").write_text(json.dumps(facts))
    return folder


def first_recalls(folder: Path, config: AlignmentConfig) -> dict[str, float]:
    image_NE, text_NE, image_of_text_N = held_out_pairs(EmbeddingStore(folder, "val"))
    _, spaces = compare_spaces(EmbeddingStore(folder, "train"), image_NE, text_NE, config)
    recalls = {name: recall_metrics(retrieval_ranks(*rows, image_of_text_N, chunk=64)) for name, rows in spaces.items()}
    return {name: metrics["text_to_image/R@1"] for name, metrics in recalls.items()}


@pytest.mark.parametrize("method", ["procrustes", "ols", "ridge", "robust"])
def test_held_out_pairs_are_found_when_aligned_and_at_chance_when_pairs_are_shuffled(method, tmp_path: Path):
    found = [first_recalls(write_store(tmp_path / str(seed), seed=seed), AlignmentConfig(method=method)) for seed in range(3)]
    median = {name: np.median([recalls[name] for recalls in found]) for name in found[0]}
    assert median["aligned"] > 60
    assert max(median["raw"], median["centred"], median["shuffled"]) < 6 * CHANCE


def test_sums_over_captions_give_the_map_of_pairs_one_by_one(tmp_path: Path):
    train = EmbeddingStore(write_store(tmp_path, seed=0), "train")
    aligner = fit_image_to_text(train, AlignmentConfig(method="ols"))
    rows = [(block.image_NE[block.image_of_text_N], block.text_NE) for block in train.blocks()]
    image_NE, text_NE = (torch.cat(side).double() for side in zip(*rows, strict=True))
    source_NE, target_NE = aligner.source_transform(image_NE), aligner.target_transform(text_NE)
    torch.testing.assert_close(aligner.weight_EF, torch.linalg.lstsq(source_NE, target_NE).solution)
    assert aligner.num_pairs == len(image_NE) == train.num_texts


def test_transforms_know_nothing_of_held_out_rows(tmp_path: Path):
    folder = write_store(tmp_path, seed=0)
    before = fit_image_to_text(EmbeddingStore(folder, "train"), AlignmentConfig())
    path = folder / "parts" / "val-0" / "texts.npy"
    np.save(path, np.load(path) + 5)
    after = fit_image_to_text(EmbeddingStore(folder, "train"), AlignmentConfig())
    assert torch.equal(before.weight_EF, after.weight_EF)
    assert before.target_transform.fingerprint == after.target_transform.fingerprint


def test_images_without_captions_are_not_retrieved_and_a_split_without_any_is_refused(tmp_path: Path):
    folder = write_store(tmp_path, seed=0)
    path = folder / "parts" / "val-0"
    owners = np.load(path / "image_of_text.npy")
    kept = owners != 4
    about = json.loads((path / "rows.json").read_text())
    for name in ("texts", "image_of_text"):
        np.save(path / f"{name}.npy", np.load(path / f"{name}.npy")[kept])
    (path / "rows.json").write_text(json.dumps({**about, "texts": ["x"] * int(kept.sum())}))
    image_NE, text_NE, image_of_text_N = held_out_pairs(EmbeddingStore(folder, "val"))
    assert len(image_NE) == NUM_HELD_OUT - 1 and len(text_NE) == kept.sum()
    assert image_of_text_N.max() == NUM_HELD_OUT - 2
    torch.testing.assert_close(image_NE[4], torch.from_numpy(np.load(path / "images.npy")[5]))
    for name in ("texts", "image_of_text"):
        np.save(path / f"{name}.npy", np.load(path / f"{name}.npy")[:0])
    (path / "rows.json").write_text(json.dumps({**about, "texts": []}))
    with pytest.raises(DataError, match="no captions"):
        held_out_pairs(EmbeddingStore(folder, "val"))
    with pytest.raises(DataError, match="no captions"):
        fit_image_to_text(EmbeddingStore(folder, "val"), AlignmentConfig())
