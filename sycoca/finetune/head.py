"""What fine-tuning puts on top of a pretrained model, and starts from random weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sycoca.config import Config, load_config
from sycoca.data.stream import LoaderConfig
from sycoca.distributed import copy_whole, is_whole
from sycoca.finetune.start import check_tokenizer
from sycoca.log import logger
from sycoca.models.init import initialise
from sycoca.models.sycoca import SyCoCa
from sycoca.pretrained import Images, Pretrained, load_weights
from sycoca.train.layer_decay import layer_scales
from sycoca.train.optim import OptimConfig
from sycoca.train.run import TrainConfig
from sycoca.types import CheckpointError, ConfigError

Head = TypeVar("Head", bound=nn.Module)
Settings = TypeVar("Settings", bound=Config)
HEAD_PREFIX = "head."
"""Keys of the head in a checkpoint's weights, beside those of the model."""


class AnswerHead(nn.Module):
    """Logits of answers from the state that has read image and question, and from the patches themselves.

    The state meets patches through attention alone, which is slow to learn what a small part of the image shows
    (docs/finetune_vqa.md). So features of the patches, each by its largest value anywhere, are added to the state, and again
    times what the question asks for (the element-wise product of Bottom-Up and Top-Down, section 3.3). Above that stands
    BEiT-3's head.

    At first every answer has the probability 1 / N (the prior of Focal Loss, arXiv 1708.02002, section 4.1): from 1 / 2 the
    loss of 3,129 answers would begin at 2,169, and the first hundreds of clipped steps would only lower it.
    """

    def __init__(self, width: int, patch_width: int, num_answers: int):
        super().__init__()
        self.value = nn.Linear(patch_width, width)
        self.question = nn.Linear(width, width)
        last = nn.Linear(2 * width, num_answers)
        self.classify = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), last)
        initialise(self)
        nn.init.constant_(last.bias, -math.log(max(1, num_answers - 1)))

    def forward(self, state_BD: Tensor, patch_NPD: Tensor, image_row_B: Tensor) -> Tensor:
        """BN: one row a state, which is about the image of its `image_row_B`."""
        value_BD = self.value(patch_NPD).amax(dim=1)[image_row_B]
        return self.classify(state_BD + value_BD * (1 + self.question(state_BD)))


def build_answer_head(model: SyCoCa, num_answers: int) -> AnswerHead:
    """The head on top of this model."""
    return AnswerHead(model.config.text.width, model.vision.width, num_answers)


def build_class_head(width: int, num_classes: int) -> nn.Sequential:
    """Logits of classes from a pooled image; the norm makes the scale of the pool no matter."""
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
    initialise(head)
    return head


def fine_tuning_scales(model: SyCoCa, head: nn.Module | None, optim: OptimConfig) -> dict[nn.Parameter, float]:
    """Factors of the learning rate: layer decay below, `head_lr_scale` in the head."""
    if head is not None:
        logger.info("start: new, from random weights: the head, %d numbers", sum(p.numel() for p in head.parameters()))
    scales = layer_scales(model, optim.layer_decay)
    return scales if head is None else scales | dict.fromkeys(head.parameters(), optim.head_lr_scale)


def whole_head_on_this_rank(head: Head, build: Callable[[], Head]) -> Head:
    """The head itself; under ZeRO-3 and FSDP2 a copy with all weights, as `whole_on_this_rank` makes. Every rank calls it.

    build: makes another head of the same shape.
    """
    if is_whole(head):
        return head
    copy = build().to(next(head.parameters()).device).eval()
    copy_whole(head, copy)
    return copy


def load_head(head: nn.Module, folder: Path) -> None:
    """A checkpoint's weights of the head; missing, unexpected or misshapen ones are a CheckpointError."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        own = {key: file.get_tensor(key) for key in file.keys() if key.startswith(HEAD_PREFIX)}  # noqa: SIM118  no dict
    load_weights(head, {key.removeprefix(HEAD_PREFIX): value for key, value in own.items()}, source=str(folder))


def read_settings(schema: type[Settings], folder: Path, name: str, *, tool: str) -> Settings:
    """What a fine-tuned checkpoint says of its head. Raises CheckpointError, with the tool that writes it, for none."""
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder} has no {name}: not a checkpoint of {tool}; fine-tune one from it")
    return load_config(schema, folder / name)


def save_settings(settings: Config, path: Path) -> None:
    """JSON that `read_settings` reads."""
    path.write_text(json.dumps(settings.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def to_pixels(images: Images, subject: Pretrained) -> Tensor:
    """BCHW on the model's device, of PIL images or of a tensor that the checkpoint's transform made."""
    if isinstance(images, Tensor):
        return images.to(subject.device)
    return torch.stack([subject.transform(image.convert("RGB")) for image in images]).to(subject.device)


def check_options(config: TrainConfig, data: LoaderConfig) -> None:
    """Raises ConfigError for settings that would be passed over: the checkpoint's tokenizer reads, and batches stay whole."""
    check_tokenizer(data)
    if config.optim.num_chunks > 1:
        raise ConfigError(
            "optim.num_chunks: only a contrastive loss needs its batch whole; for less memory lower data.batch_size, or set "
            "start.recompute=true"
        )
