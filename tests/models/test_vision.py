"""The image encoder: what is hidden from it cannot be seen, and what cannot be built is refused."""

import pytest
import torch
from builders import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, VISION_WIDTH, build_batch, model_config, shake, vision_options
from torch import Tensor

from sycoca.models.image_decoder import patchify, unpatchify
from sycoca.models.vision import VisionConfig, VisionEncoder
from sycoca.types import ConfigError

WITHOUT_CLASS = {"class_token": False}
WITH_REGISTERS = {"reg_tokens": 3}
KINDS = pytest.mark.parametrize("options", [{}, WITHOUT_CLASS, WITH_REGISTERS, {"pre_norm": True}])


def build_encoder(*, has_mask_token: bool = False, **options) -> VisionEncoder:
    config = model_config(vision=vision_options(**options)).vision
    encoder = VisionEncoder(config, has_mask_token=has_mask_token)
    shake(encoder)
    return encoder.eval()


def with_other_pixels(image_BCHW: Tensor, place_BK: Tensor, value: float) -> Tensor:
    """The image with the patches at these places filled with `value`."""
    pixel_BPX = patchify(image_BCHW, PATCH_SIZE)
    filled = pixel_BPX.scatter(1, place_BK[..., None].expand(-1, -1, pixel_BPX.shape[-1]), value)
    return unpatchify(filled, PATCH_SIZE)


VISIBLE_BK = torch.tensor([[0, 2, 3, 8], [1, 4, 5, 6], [0, 1, 2, 3], [2, 5, 7, 8]])
DROPPED_BK = torch.tensor([[p for p in range(NUM_PATCHES) if p not in row] for row in VISIBLE_BK.tolist()])
IS_HIDDEN_BP = torch.zeros(4, NUM_PATCHES, dtype=torch.bool).scatter(1, DROPPED_BK, True)


@KINDS
@pytest.mark.parametrize("value", [7.0, float("nan")])
@torch.no_grad()
def test_dropped_patches_cannot_influence_the_encoding_of_the_visible(options: dict, value: float):
    encoder, image = build_encoder(**options), build_batch()["image"]
    patch_BKD, class_BD = encoder(image, visible_BK=VISIBLE_BK)
    other_BKD, other_BD = encoder(with_other_pixels(image, DROPPED_BK, value), visible_BK=VISIBLE_BK)
    assert patch_BKD.shape == (4, 4, VISION_WIDTH) and class_BD.shape == (4, VISION_WIDTH)
    assert patch_BKD.equal(other_BKD) and class_BD.equal(other_BD)


@torch.no_grad()
def test_visible_patches_do_influence_the_encoding():
    encoder, image = build_encoder(), build_batch()["image"]
    changed = with_other_pixels(image, VISIBLE_BK[:, :1], 7.0)
    assert not torch.allclose(
        encoder(image, visible_BK=VISIBLE_BK)[0][:, 1:], encoder(changed, visible_BK=VISIBLE_BK)[0][:, 1:]
    )


@KINDS
@torch.no_grad()
def test_seeing_all_patches_equals_the_full_encoding(options: dict):
    encoder, image = build_encoder(**options), build_batch()["image"]
    everything_BK = torch.arange(NUM_PATCHES).expand(4, -1)
    for actual, expected in zip(encoder(image, visible_BK=everything_BK), encoder(image), strict=True):
        assert actual.equal(expected)


@torch.no_grad()
def test_visible_patches_keep_their_places():
    """Positions are added before patches are dropped: one image seen at two orders of places gives reordered states."""
    encoder, image = build_encoder(), build_batch()["image"]
    forwards, backwards = encoder(image, visible_BK=VISIBLE_BK)[0], encoder(image, visible_BK=VISIBLE_BK.flip(1))[0]
    torch.testing.assert_close(backwards.flip(1), forwards)


@KINDS
@pytest.mark.parametrize("value", [7.0, float("nan")])
@torch.no_grad()
def test_pixels_behind_mask_tokens_cannot_influence_anything(options: dict, value: float):
    encoder, image = build_encoder(has_mask_token=True, **options), build_batch()["image"]
    patch_BPD, class_BD = encoder(image, is_hidden_BP=IS_HIDDEN_BP)
    other_BPD, other_BD = encoder(with_other_pixels(image, DROPPED_BK, value), is_hidden_BP=IS_HIDDEN_BP)
    assert patch_BPD.shape == (4, NUM_PATCHES, VISION_WIDTH)
    assert patch_BPD.equal(other_BPD) and class_BD.equal(other_BD)


@torch.no_grad()
def test_the_mask_token_stands_in_place_of_hidden_patches():
    encoder, image = build_encoder(has_mask_token=True), build_batch()["image"]
    hidden = encoder(image, is_hidden_BP=IS_HIDDEN_BP)[0]
    assert not torch.allclose(hidden, encoder(image)[0])
    encoder.hide.mask_token += 1.0
    assert not torch.allclose(hidden, encoder(image, is_hidden_BP=IS_HIDDEN_BP)[0])


@torch.no_grad()
def test_a_hidden_or_dropped_call_leaves_nothing_behind_for_the_next():
    encoder, image = build_encoder(has_mask_token=True), build_batch()["image"]
    before = encoder(image)[0]
    encoder(image, visible_BK=VISIBLE_BK)
    encoder(image, is_hidden_BP=IS_HIDDEN_BP)
    assert encoder.keep.index_BK is None and encoder.hide.is_hidden_BP is None
    assert encoder(image)[0].equal(before)


def test_every_weight_is_saved_under_one_name():
    """safetensors refuses a tensor that two keys share."""
    encoder = build_encoder(has_mask_token=True)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


@torch.no_grad()
def test_without_a_class_token_the_patches_mean_stands_for_it():
    encoder, image = build_encoder(**WITHOUT_CLASS), build_batch()["image"]
    patch_BPD, class_BD = encoder(image)
    torch.testing.assert_close(class_BD, patch_BPD.mean(dim=1))


@torch.no_grad()
def test_registers_are_not_patches():
    encoder, image = build_encoder(**WITH_REGISTERS), build_batch()["image"]
    patch_BPD, class_BD = encoder(image)
    assert patch_BPD.equal(encoder.vit(image)[:, 4:]) and class_BD.equal(encoder.vit(image)[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_no_such_model"}, "vit_no_such_model"),
        ({"name": "resnet18", "options": {}}, "resnet18"),
        ({"options": {"no_such_option": 1}}, "no_such_option"),
        ({"options": {"embed_dim": 8, "num_heads": 3}}, "model.vision"),
        ({"image_size": IMAGE_SIZE + 1}, "model.vision.image_size: 13"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_a_configuration_error(change: dict, message: str):
    config = model_config().vision.model_dump() | change
    with pytest.raises(ConfigError, match=message):
        VisionEncoder(VisionConfig(**config))


def test_gradients_are_the_same_with_recomputation():
    def gradient(*, recompute: bool) -> Tensor:
        torch.manual_seed(0)
        config = model_config(vision={"drop_path": 0.5}).vision
        encoder = VisionEncoder(config, recompute=recompute).train()
        torch.manual_seed(1)
        encoder(build_batch()["image"], visible_BK=VISIBLE_BK)[0].square().sum().backward()
        return encoder.vit.patch_embed.proj.weight.grad

    torch.testing.assert_close(gradient(recompute=True), gradient(recompute=False))
