"""Eight pairs can be learned by heart: every objective falls, and greedy and beam search give the captions back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import IMAGE_SIZE, PATCH_SIZE, model_config

from sycoca.data.tokenizer import build_tokenizer, train_word_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.generation import GenerationConfig
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import SyCoCa
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.pretrained import Pretrained, PretrainedConfig
from sycoca.train.optim import OptimConfig, build_optimizer, set_lr
from sycoca.train.task import PretrainTask, needed_parts
from sycoca.types import Batch

CAPTIONS = [
    "a black dog runs through the tall grass",
    "a black dog runs after a red ball",
    "two children play on the beach at sunset",
    "a man in a blue shirt climbs a steep rock",
    "a girl rides her bicycle down the street",
    "three men are playing football in the mud",
    "a white bird flies low over the water",
    "a woman with a red hat reads a book on a bench",
]
MAX_TOKENS = 20
PLAN = OptimConfig(lr=4e-3, num_steps=150, warmup_steps=10, weight_decay=0.0)
OBJECTIVES = {
    "itc": ContrastiveConfig(),
    "ic": CaptioningConfig(weight=2.0, drop_share=0.25),
    "tg_mim": MaskedImageConfig(),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model after training on eight images of noise, the images, and the metrics of the first and the last step."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("words")
    train_word_tokenizer(CAPTIONS, folder)
    tokenizer = build_tokenizer(folder)
    token, length = tokenizer.tokenize(CAPTIONS, MAX_TOKENS)
    image = torch.randn(len(CAPTIONS), 3, IMAGE_SIZE, IMAGE_SIZE)
    batch = Batch(image=image, token=token, length=length, key=[str(n) for n in range(len(CAPTIONS))], position={})
    vision = {"options": {"patch_size": PATCH_SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2}}
    text = {"width": 48, "num_layers": 2, "num_heads": 2}
    config = model_config(vision=vision, text=text, embed_width=24, image_decoder={"width": 64})
    parts = needed_parts(OBJECTIVES)
    model = SyCoCa(config, vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=parts)
    task = PretrainTask(model, OBJECTIVES, RelevanceConfig())
    optimizer, history = build_optimizer(task, PLAN), []
    for step in range(PLAN.num_steps):
        set_lr(optimizer, PLAN.lr_at(step))
        loss, metrics = task(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), PLAN.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append(metrics)
    description = PretrainedConfig(
        model=config, parts=sorted(parts), transform=TransformConfig(size=IMAGE_SIZE), relevance=RelevanceConfig(),
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    subject = Pretrained(model.eval(), tokenizer, description)
    return {"subject": subject, "image": image, "first": history[0], "last": history[-1]}


@pytest.mark.parametrize(("name", "share"), [("itc", 0.02), ("ic", 0.02), ("tg_mim", 0.6)])
def test_every_objective_falls(learned: dict, name: str, share: float):
    first, last = (float(learned[which][f"{name}/loss"]) for which in ("first", "last"))
    assert last < share * first


@pytest.mark.parametrize(
    "generation",
    [GenerationConfig(), GenerationConfig(method="beam", num_beams=3)],
    ids=["greedy", "beam"],
)
def test_the_captions_come_back_word_for_word(learned: dict, generation: GenerationConfig):
    assert learned["subject"].caption(learned["image"], generation=generation) == CAPTIONS


def test_images_and_captions_find_each_other(learned: dict):
    image_BE = torch.nn.functional.normalize(learned["subject"].encode_image(learned["image"]), dim=-1)
    text_BE = torch.nn.functional.normalize(learned["subject"].encode_text(CAPTIONS), dim=-1)
    similarity = image_BE @ text_BE.T
    assert similarity.argmax(dim=0).tolist() == similarity.argmax(dim=1).tolist() == list(range(len(CAPTIONS)))


def test_another_image_gets_another_caption(learned: dict):
    """The caption is read off the image: shuffled images give shuffled captions."""
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    assert learned["subject"].caption(learned["image"][order]) == [CAPTIONS[number] for number in order]
