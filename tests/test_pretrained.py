"""A trained model as a user has it: PIL images and strings in, captions out."""

import pytest
import torch
from builders import IMAGE_SIZE, MAX_TOKENS, model_config, shake
from PIL import Image

from sycoca.data.tokenizer import build_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.generation import GenerationConfig
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.pretrained import Pretrained, PretrainedConfig
from sycoca.types import CheckpointError

IMAGES = [Image.new("RGB", (20, 30), colour) for colour in ("red", "green", "blue")]


def build_subject(parts: list[Part]) -> Pretrained:
    tokenizer = build_tokenizer("clip")
    torch.manual_seed(0)
    model = SyCoCa(model_config(), vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=set(parts))
    shake(model)
    transform = TransformConfig(size=IMAGE_SIZE)
    config = PretrainedConfig(
        model=model_config(), parts=parts, transform=transform, relevance=RelevanceConfig(), max_tokens=MAX_TOKENS
    )
    return Pretrained(model.eval(), tokenizer, config)


def test_several_captions_an_image_are_different_and_the_best_is_the_one_that_caption_gives():
    subject = build_subject(["text", "text_decoder"])
    beam = GenerationConfig(method="beam", num_beams=4, max_tokens=4)
    several = subject.captions(IMAGES, generation=beam.model_copy(update={"num_return": 3}))
    assert [len(set(of_image)) for of_image in several] == [3, 3, 3]
    assert [of_image[0] for of_image in several] == subject.caption(IMAGES, generation=beam)


def test_a_model_without_a_decoder_says_that_it_cannot_write():
    with pytest.raises(CheckpointError, match="without the part 'text_decoder' and cannot write captions"):
        build_subject(["text", "contrast"]).captions(IMAGES)
