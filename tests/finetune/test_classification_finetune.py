"""Fine-tuning for classification: losses against plain ones, mixing that repeats, and a run from end to end."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from builders import IMAGE_SIZE, assert_same_gradients, build_model, gradients, shake
from labelled_data import COLOURS, TRANSFORM, loud_logger, run_settings, save_start, write_images
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sycoca.config import load_config, parse_config
from sycoca.finetune.classification import FinetuneClassificationConfig, finetune_classification, load_classifier
from sycoca.finetune.classification_model import (
    ClassBatch,
    ImageClassifier,
    ImagePool,
    MixConfig,
    build_mixup,
    classification_parts,
    count_hits,
    numpy_drawing_from_torch,
    pool_image,
    pooled_width,
)
from sycoca.finetune.head import build_class_head
from sycoca.types import CheckpointError, ConfigError, DataError

__all__ = ["loud_logger"]
pytestmark = pytest.mark.usefixtures("loud_logger")
CONFIGS = Path(__file__).parents[2] / "configs" / "finetune"
NUM_CLASSES, NUM_IMAGES = 7, 4
POOLS: tuple[ImagePool, ...] = get_args(ImagePool)
MIX = MixConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def build_classifier(pool: ImagePool = "mean", mix: MixConfig | None = None) -> ImageClassifier:
    model = build_model(classification_parts(pool))
    head = build_class_head(pooled_width(model, pool), NUM_CLASSES)
    shake(head)
    return ImageClassifier(model, head, pool=pool, mix=mix or MixConfig(), num_classes=NUM_CLASSES)


def build_images() -> ClassBatch:
    generator = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    nothing = torch.zeros(NUM_IMAGES, 2, dtype=torch.int64)
    return ClassBatch(
        image=image_BCHW, token=nothing, length=nothing[:, 0] + 2, key=list("abcd"), position={},
        target=torch.tensor([6, 0, 2, 2]),
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_its_gradient_are_those_of_a_plain_loop(smoothing: float):
    network, batch = build_classifier("max", MixConfig(label_smoothing=smoothing)).train(), build_images()
    loss, metrics = network(batch)
    loss.backward()
    found = gradients(network)
    network.zero_grad()
    total, num_right = torch.zeros(()), 0
    for row, right in enumerate(batch["target"].tolist()):
        patch_BPD, _ = network.model.vision(batch["image"][row : row + 1])
        log_prob_N = network.head(torch.stack([patch_BPD[0, :, d].max() for d in range(patch_BPD.shape[2])])).log_softmax(0)
        total = total - (1 - smoothing) * log_prob_N[right] - smoothing * log_prob_N.mean()
        num_right += int(log_prob_N.argmax()) == right
    total = total / NUM_IMAGES
    total.backward()
    torch.testing.assert_close(loss, total)
    assert_same_gradients(found, gradients(network))
    assert float(metrics["accuracy"]) == num_right / NUM_IMAGES


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_that_is_trained_has_a_gradient(pool: ImagePool):
    network = build_classifier(pool)
    network(build_images())[0].backward()
    gradients(network)  # fails where a trainable parameter has none, which DDP would refuse
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen == (["model.text_projection.weight"] if pool == "embedding" else [])


@pytest.mark.parametrize("pretraining", ["max", "mean", "cls", "attention"])
def test_the_embedding_pool_is_the_image_embedding_of_pretraining(pretraining: str):
    model, image_BCHW = build_model(classification_parts("embedding"), pool=pretraining), build_images()["image"]
    torch.testing.assert_close(pool_image(model, image_BCHW, "embedding"), model.encode_image(image_BCHW))


def test_mixed_images_give_the_loss_of_their_mixed_classes():
    network, batch = build_classifier(mix=MIX).train(), build_images()
    before = batch["image"].clone()
    torch.manual_seed(5)
    loss, _ = network(batch)
    torch.manual_seed(5)
    with numpy_drawing_from_torch():
        image_BCHW, share_BN = build_mixup(MIX, NUM_CLASSES)(before.clone(), batch["target"])
    torch.testing.assert_close(share_BN.sum(1), torch.ones(NUM_IMAGES))
    expected = -(share_BN * network.logits(image_BCHW).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert batch["image"].equal(before)


def test_mixing_is_drawn_from_the_random_state_that_checkpoints_keep():
    network, batch = build_classifier(mix=MIX).train(), build_images()
    np.random.seed(3)
    expected = np.random.RandomState(3).rand()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = network(batch)[0].item(), network(batch)[0].item()
    assert first != second
    torch.set_rng_state(state)
    assert [network(batch)[0].item() for _ in range(2)] == [first, second]
    assert np.random.rand() == expected, "numpy's own state was moved"


def test_nothing_is_mixed_in_evaluation():
    network, batch = build_classifier(mix=MIX).eval(), build_images()
    expected = F.cross_entropy(network.logits(batch["image"]), batch["target"], label_smoothing=0.1)
    torch.testing.assert_close(network(batch)[0], expected)


def test_hits_are_counted_by_class_and_ties_go_against_the_right_one():
    logit_BN = torch.tensor([
        [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],  # class 0 first
        [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],  # class 1 last of six
        [2.0, 2.0, 0.0, 0.0, 0.0, 0.0],  # class 1 tied for the first place: second
        [float("nan")] * 6,
    ])  # fmt: skip
    count_3N = count_hits(logit_BN, torch.tensor([0, 1, 1, 5]))
    assert count_3N.tolist() == [[1, 2, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


def make_config(folder: Path, *, num_steps: int, **changes: Any) -> FinetuneClassificationConfig:
    tree = {
        **run_settings(folder / "run", num_steps=num_steps, lr=0.01, layer_decay=0.9, head_lr_scale=2.0),
        "start": {"checkpoint": str(folder / "start")},
        "data": {"images": [str(folder / "images")], "batch_size": 6, "num_workers": 0, "transform": TRANSFORM},
        "evaluate": {"images": [str(folder / "images")], "every": num_steps, "batch_size": 4},
    }
    for name, change in changes.items():
        tree[name] = {**tree.get(name, {}), **change} if isinstance(change, dict) else change
    return parse_config(FinetuneClassificationConfig, tree, source="tests")


@pytest.mark.parametrize("pool", POOLS)
def test_a_few_images_are_learnt_by_heart_and_the_checkpoint_classifies_the_same(tmp_path: Path, pool: ImagePool):
    save_start(tmp_path / "start")
    paths = write_images(tmp_path / "images")
    figures = finetune_classification(make_config(tmp_path, num_steps=40, pool=pool))
    assert (figures["top_1"], figures["mean_per_class"], figures["num_images"]) == (100.0, 100.0, 6.0)
    classifier = load_classifier(tmp_path / "run")
    assert classifier.class_names == tuple(sorted(COLOURS))
    images = [Image.open(path) for path in paths]
    assert classifier.classify(images) == [path.parent.name for path in paths]
    torch.testing.assert_close(classifier.logits(images)[2:3], classifier.logits(images[2:3]))
    assert isinstance(classifier.logits(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)), Tensor)


def test_a_recipe_with_everything_on_runs_and_takes_smaller_validation_sets(tmp_path: Path):
    save_start(tmp_path / "start")
    write_images(tmp_path / "images")
    write_images(tmp_path / "val", num_each=1)
    (tmp_path / "val" / "green" / "0.png").rename(tmp_path / "val" / "blue" / "1.png")
    (tmp_path / "val" / "green").rmdir()
    figures = finetune_classification(make_config(
        tmp_path, num_steps=2, mix={"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
        start={"image_size": 20, "drop_path": 0.1},
        data={"transform": {**TRANSFORM, "train": "random_resized_crop", "flip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}},
        evaluate={"images": [str(tmp_path / "val")]}, optim={"average_decay": 0.9},
    ))  # fmt: skip
    assert figures["num_images"] == 3.0
    assert load_classifier(tmp_path / "run").class_names == tuple(sorted(COLOURS))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("classification_*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_are_whole(path: Path):
    config = load_config(FinetuneClassificationConfig, path)
    assert Path(config.run.folder).name == path.stem
    assert config.evaluate.images != config.data.images
    command = f"tools/finetune_classification.py configs/finetune/{path.name}"
    assert command in path.read_text(encoding="utf-8").replace("\\\n#   ", "")


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path):
    save_start(tmp_path / "start", parts=("text", "text_decoder"))
    write_images(tmp_path / "images")
    with pytest.raises(CheckpointError, match="without the part 'contrast'"):
        finetune_classification(make_config(tmp_path, num_steps=1))
    with pytest.raises(ConfigError, match=r"data\.batch_size: 5 images cannot be mixed"):
        finetune_classification(make_config(tmp_path, num_steps=1, mix={"mixup": 0.8}, data={"batch_size": 5}))
    with pytest.raises(CheckpointError, match=r"no classes\.json: not a checkpoint of tools/finetune_classification\.py"):
        load_classifier(tmp_path / "start")
    write_images(tmp_path / "val")
    (tmp_path / "val" / "green").rename(tmp_path / "val" / "purple")
    with pytest.raises(DataError, match="'purple' is none of the 3"):
        finetune_classification(make_config(tmp_path, num_steps=1, pool="mean", evaluate={"images": [str(tmp_path / "val")]}))
