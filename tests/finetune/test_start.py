"""Where a fine-tuning starts: all weights of the checkpoint, or an error; never random numbers unsaid."""

import logging
from pathlib import Path

import pytest
import torch
from builders import IMAGE_SIZE, MAX_TOKENS, PATCH_SIZE, model_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from sycoca.data.tokenizer import build_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.finetune.start import StartConfig, interpolate_positions, start_from
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import Part, SyCoCa
from sycoca.pretrained import MODEL_PREFIX, PretrainedConfig, save_description
from sycoca.types import CheckpointError

PARTS: list[Part] = ["contrast", "text", "text_decoder"]


def save_checkpoint(folder: Path, *, parts: list[Part] = PARTS) -> dict[str, Tensor]:
    """A checkpoint of a tiny model with noisy weights; gives its weights."""
    folder.mkdir()
    tokenizer = build_tokenizer("clip")
    torch.manual_seed(0)
    model = SyCoCa(model_config(), vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=set(parts))
    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file({MODEL_PREFIX + name: value for name, value in weights.items()}, folder / "model.safetensors")
    transform = TransformConfig(size=IMAGE_SIZE, mean=(0.1, 0.2, 0.3))
    config = PretrainedConfig(
        model=model_config(), parts=parts, transform=transform, relevance=RelevanceConfig(), max_tokens=MAX_TOKENS
    )
    save_description(folder, tokenizer, config)
    return weights


def test_every_weight_comes_from_the_checkpoint_and_what_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    weights = save_checkpoint(tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="sycoca"):
        start = start_from(StartConfig(checkpoint=str(tmp_path / "run")), parts={"text", "text_decoder"})
    for name, value in start.model.state_dict().items():
        if name != "text.summary_D":
            assert value.equal(weights[name]), name
    assert start.config.parts == ["text", "text_decoder"]
    assert "image_projection.weight" in caplog.text


def test_random_weights_take_the_architecture_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    weights = save_checkpoint(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="sycoca"):
        start = start_from(StartConfig(checkpoint=str(tmp_path / "run"), weights="random"), parts=set(PARTS))
    assert not start.model.vision.vit.blocks[0].attn.qkv.weight.equal(weights["vision.vit.blocks.0.attn.qkv.weight"])
    assert "random weights" in caplog.text


def test_another_resolution_interpolates_positions_and_keeps_the_class_token(tmp_path: Path):
    weights = save_checkpoint(tmp_path / "run")
    size = IMAGE_SIZE + 2 * PATCH_SIZE
    start = start_from(
        StartConfig(checkpoint=str(tmp_path / "run"), image_size=size), parts=set(PARTS), transform=TransformConfig(flip=0.5)
    )
    position = start.model.vision.vit.pos_embed
    assert position.shape[1] == 1 + 5 * 5
    assert position[0, 0].equal(weights["vision.vit.pos_embed"][0, 0])
    assert start.config.transform == TransformConfig(size=size, mean=(0.1, 0.2, 0.3), flip=0.5)


def test_interpolated_positions_of_a_linear_ramp_stay_a_ramp(tmp_path: Path):
    save_checkpoint(tmp_path / "run")
    model = start_from(StartConfig(checkpoint=str(tmp_path / "run"), image_size=7 * PATCH_SIZE), parts=set(PARTS)).model
    column = torch.arange(3.0).repeat(3)
    ramp = torch.cat([torch.zeros(1), column])[None, :, None].expand(1, 10, 8).contiguous()
    grid = interpolate_positions(ramp, model)[0, 1:, 0].reshape(7, 7)
    assert (grid - grid[0]).abs().max() < 1e-5, "rows are alike"
    assert (grid[0].diff() > -0.05).all()
    assert grid[0, 3] == pytest.approx(1.0, abs=1e-5), "the middle stays in the middle"


def test_a_checkpoint_without_the_part_is_one_clear_error(tmp_path: Path):
    save_checkpoint(tmp_path / "run", parts=["contrast", "text"])
    with pytest.raises(CheckpointError, match="without the part 'text_decoder' and cannot write or answer"):
        start_from(StartConfig(checkpoint=str(tmp_path / "run")), parts={"text", "text_decoder"})


def test_a_missing_weight_is_an_error_and_never_a_random_start(tmp_path: Path):
    save_checkpoint(tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    weights = load_file(path)
    del weights[MODEL_PREFIX + "text_decoder.stack.blocks.0.mlp.fc.weight"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="lacks 1 weights of this model: text_decoder"):
        start_from(StartConfig(checkpoint=str(tmp_path / "run")), parts=set(PARTS))
