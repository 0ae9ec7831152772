"""Everything the quickstart shows, measured on the held-out scenes, with chance and the goals beside it."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import sycoca
from sycoca.data.pipeline import DataConfig, build_eval_loader
from sycoca.data.scenes import CLASS_NAMES, CLASS_TEMPLATES
from sycoca.evaluation.image_sources import batch_images, labelled_images
from sycoca.evaluation.relevance import ReconstructionEvaluator, RelevanceEvaluator, read_annotated
from sycoca.evaluation.retrieval import RetrievalEvaluator
from sycoca.evaluation.scene_captions import score_captions
from sycoca.evaluation.zero_shot import ZeroShotEvaluator
from sycoca.pretrained import Pretrained
from sycoca.train.reconstruction import TextGuidedReconstruction, read_masked_image_config

BATCH_SIZE = 100
NUM_ANNOTATED = 500
"""Scenes on which relevance and reconstruction are measured; more changes the third decimal."""


class Goal(NamedTuple):
    """One row of the table."""

    label: str
    form: str
    chance: str
    goal: str


GOALS = {
    "text_to_image/R@1": Goal("text to image, R@1 (%)", ".1f", "0.1", "at least 2"),
    "image_to_text/R@1": Goal("image to text, R@1 (%)", ".1f", "0.1", "at least 2"),
    "zero_shot/top_1": Goal("zero-shot class of 64 (%)", ".1f", "1.6", "at least 7.8"),
    "caption/all_right": Goal("captions whose every object is there (%)", ".1f", "", "most"),
    "relevance/named_vs_background": Goal("relevance finds named objects (AUC)", ".3f", "0.5", "at least 0.8"),
    "relevance/unnamed_vs_background": Goal("relevance finds other objects (AUC)", ".3f", "0.5", "below the named"),
    "reconstruction/error/own": Goal("masked patches, error with own caption", ".4f", "", ""),
    "reconstruction/error/other": Goal("masked patches, error with another's caption", ".4f", "", "above own"),
    "reconstruction/error/none": Goal("masked patches, error without a caption", ".4f", "", "above own"),
}


def measure(run: Path, scenes: Path) -> dict[str, float]:
    """Retrieval, zero-shot, captions, relevance and reconstruction of a run on `scenes`' held-out shards."""
    subject = sycoca.load(run)
    shards = [str(scenes / "val-*.tar")]
    figures = measure_pairs(subject, shards)
    annotated = list(islice(read_annotated(shards), NUM_ANNOTATED))
    figures |= {f"relevance/{name}": value for name, value in RelevanceEvaluator(annotated)(subject).items()}
    config = read_masked_image_config(run)
    if config is not None and config.text_guided:
        reconstruction = ReconstructionEvaluator(annotated)(TextGuidedReconstruction(subject, config))
        figures |= {f"reconstruction/{name}": value for name, value in reconstruction.items()}
    return figures


def measure_pairs(subject: Pretrained, shards: list[str]) -> dict[str, float]:
    """Retrieval over all captions, zero-shot classes, and whether the captions written are right."""
    data = DataConfig(shards=shards, batch_size=BATCH_SIZE, num_workers=0, transform=subject.config.transform)
    loader = build_eval_loader(data, rank=0, world_size=1, batch_size=BATCH_SIZE)
    batches = list(loader)
    figures = RetrievalEvaluator(batches)(subject)
    captions = [caption for batch in batches for caption in subject.caption(batch["image"])]
    objects = [[f"{item['colour']} {item['shape']}" for item in meta["objects"]] for batch in batches for meta in batch["meta"]]
    places: dict[str | int, int] = {name: place for place, name in enumerate(CLASS_NAMES)}
    labelled = batch_images(labelled_images(shards), subject.transform, places=places, batch_size=BATCH_SIZE)
    zero_shot = ZeroShotEvaluator(labelled, class_names=CLASS_NAMES, templates=CLASS_TEMPLATES)(subject)
    return {
        **figures,
        **{f"zero_shot/{name}": value for name, value in zero_shot.items()},
        **{f"caption/{name}": value for name, value in score_captions(captions, objects).items()},
    }
