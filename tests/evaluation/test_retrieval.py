"""Retrieval against loops and hand-made cases, in one process and in two."""


import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sycoca.evaluation.retrieval import RetrievalEvaluator, recall_metrics, retrieval_ranks
from sycoca.types import DataError
from tests.forks import run_ranks

NUM_IMAGES, WIDTH = 11, 6


class TableEncoder:
    """An image is its number, a text is "image caption"; embeddings are of no particular length."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return torch.stack([vector_of(int(image_CHW[0, 0, 0]), 0) for image_CHW in image_BCHW])

    def encode_text(self, texts: list[str]) -> Tensor:
        pairs = [text.split() if " " in text else ("0", "1") for text in texts]
        return torch.stack([vector_of(int(image), int(caption)) for image, caption in pairs])


def vector_of(image: int, caption: int) -> Tensor:
    common_E = torch.randn(WIDTH, generator=torch.Generator().manual_seed(image))
    noise_E = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 + 10 * image + caption))
    return (common_E + 0.8 * noise_E) * (1 + caption)


def make_batches(images: list[int], batch_size: int) -> list[dict]:
    groups = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return [
        {
            "image": torch.tensor(group).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2),
            "key": [f"key{image:03d}" for image in group],
            "captions": [[f"{image} {caption}" for caption in range(1, 2 + image % 3)] for image in group],
        }
        for group in groups
    ]


def ranks_by_loop(image_NE: Tensor, text_NE: Tensor, image_of_text_N: Tensor) -> tuple[list[int], list[int]]:
    score_NN = image_NE.double().numpy() @ text_NE.double().numpy().T
    owner_N = image_of_text_N.numpy()
    image_to_text, text_to_image = [], []
    for image in range(len(image_NE)):
        best = score_NN[image, owner_N == image].max()
        image_to_text.append(1 + int((score_NN[image, owner_N != image] >= best).sum()))
    for text in range(len(text_NE)):
        others_N = np.delete(score_NN[:, text], owner_N[text])
        text_to_image.append(1 + int((others_N >= score_NN[owner_N[text], text]).sum()))
    return image_to_text, text_to_image


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image_of_text_N = torch.cat([torch.arange(13), torch.randint(0, 13, (24,), generator=generator)])
    image_NE = F.normalize(torch.randn(13, 5, generator=generator), dim=-1)
    text_NE = F.normalize(image_NE[image_of_text_N] + torch.randn(37, 5, generator=generator), dim=-1)
    return image_NE, text_NE, image_of_text_N


def test_an_image_is_found_at_the_best_of_its_five_captions():
    image_NE = torch.eye(3)[:2]
    captions_NE = [[0.0, 0.0, 1.0]] * 4 + [[0.9, 0.1, 0.0]]  # of image 0: four that say nothing, one that hits
    captions_NE += [[0.8, 0.2, 0.0]] + [[0.0, 0.5, 0.0]] * 4  # of image 1: one nearer to image 0, four right ones
    ranks = retrieval_ranks(image_NE, torch.tensor(captions_NE), torch.arange(2).repeat_interleave(5), chunk=3)
    assert ranks.image_to_text_N.tolist() == [1, 1]
    assert ranks.text_to_image_N.tolist() == [2, 2, 2, 2, 1, 2, 1, 1, 1, 1]
    metrics = recall_metrics(ranks)
    assert metrics["image_to_text/R@1"] == 100.0
    assert metrics["text_to_image/R@1"] == 50.0
    assert metrics["text_to_image/R@5"] == 100.0
    assert metrics["text_to_image/mean_rank"] == 1.5
    assert metrics["text_to_image/median_rank"] == 1.5
    assert metrics["mean_recall"] == pytest.approx(550 / 6)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_equal_a_float64_loop_whatever_the_chunk(seed: int, chunk: int):
    case = random_case(seed)
    ranks = retrieval_ranks(*case, chunk=chunk)
    assert (ranks.image_to_text_N.tolist(), ranks.text_to_image_N.tolist()) == ranks_by_loop(*case)
    assert ranks.image_to_text_N.unique().numel() > 2


@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_constant_and_broken_embeddings_come_last(value: float):
    image_NE, text_NE = torch.full((4, 3), value), torch.full((8, 3), value)
    ranks = retrieval_ranks(image_NE, text_NE, torch.arange(8) % 4, chunk=3)
    assert ranks.image_to_text_N.tolist() == [7] * 4
    assert ranks.text_to_image_N.tolist() == [4] * 8


def test_the_evaluator_equals_the_loop_over_its_unit_embeddings():
    metrics = RetrievalEvaluator(make_batches(list(range(NUM_IMAGES)), 4), text_batch_size=5, chunk=3)(TableEncoder())
    texts = [text for batch in make_batches(list(range(NUM_IMAGES)), 4) for row in batch["captions"] for text in row]
    image_NE = F.normalize(torch.stack([vector_of(image, 0) for image in range(NUM_IMAGES)]), dim=-1)
    text_NE = F.normalize(TableEncoder().encode_text(texts), dim=-1)
    owner_N = torch.tensor([int(text.split()[0]) for text in texts])
    image_to_text, text_to_image = (np.array(places) for places in ranks_by_loop(image_NE, text_NE, owner_N))
    for k in (1, 5, 10):
        assert metrics[f"image_to_text/R@{k}"] == pytest.approx(100 * (image_to_text <= k).mean())
        assert metrics[f"text_to_image/R@{k}"] == pytest.approx(100 * (text_to_image <= k).mean())
    assert metrics["text_to_image/median_rank"] == np.median(text_to_image)
    assert metrics["image_to_text/mean_rank"] == pytest.approx(image_to_text.mean())
    assert (metrics["num_images"], metrics["num_captions"]) == (NUM_IMAGES, len(texts))
    assert 0 < metrics["image_to_text/R@1"] < 100


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "found none"),
        (make_batches([1, 2, 1], 3), "key001: two images"),
        ([{**make_batches([1], 1)[0], "captions": [[]]}], "without captions"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(batches: list[dict], message: str):
    with pytest.raises(DataError, match=message):
        RetrievalEvaluator(batches)(TableEncoder())


@pytest.mark.slow
def test_two_processes_with_uneven_shares_give_the_numbers_of_one():
    found = run_ranks(evaluate_shares, 2)
    alone = RetrievalEvaluator(make_batches(list(range(NUM_IMAGES)), 4), chunk=3)(TableEncoder())
    assert found == [[alone] * len(UNEVEN_SHARES)] * 2


UNEVEN_SHARES = [[[0, 3, 6, 9, 4, 10, 8], [1, 2, 5, 7]], [list(range(NUM_IMAGES))[::-1], []]]


def evaluate_shares() -> list[dict[str, float]]:
    """On one rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    evaluators = [RetrievalEvaluator(make_batches(shares[rank], 3), chunk=2) for shares in UNEVEN_SHARES]
    return [evaluator(TableEncoder()) for evaluator in evaluators]
