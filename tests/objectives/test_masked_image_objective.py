"""TG-MIM: targets and loss against plain loops, and what each way of encoding can and cannot see."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from builders import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, build_batch, build_model
from torch import Tensor

from sycoca.models.image_decoder import patchify, unpatchify
from sycoca.models.sycoca import SyCoCa
from sycoca.objectives.masked_image import MaskedImageConfig, MaskedImageObjective, patch_targets
from sycoca.types import Batch, Features

Encode = Literal["visible", "mask_tokens", "features"]
EVERY_ENCODING = pytest.mark.parametrize("encode", ["visible", "mask_tokens", "features"])
NUM_MASKED = 4
PIXELS = 3 * PATCH_SIZE**2


def prepare(config: MaskedImageConfig) -> tuple[MaskedImageObjective, SyCoCa, Batch, Features]:
    """Features whose relevance is random; the model has the parts that contrast needs too."""
    objective = config.build()
    model, batch = build_model(objective.needs | {"text", "contrast"}), build_batch()
    score_BP = torch.randn(batch["image"].shape[0], NUM_PATCHES)
    return objective, model, batch, replace(model.encode(batch), relevance_BP=score_BP)


def predict(objective: MaskedImageObjective, model: SyCoCa, batch: Batch, features: Features) -> Tensor:
    return objective.reconstruct(model, batch, features, *objective.split(features))


def masked_by_hand(score_BP: Tensor) -> list[list[int]]:
    orders = [sorted(range(NUM_PATCHES), key=lambda place: -row[place]) for row in score_BP.tolist()]
    return [sorted(order[:NUM_MASKED]) for order in orders]


def patch_pixels(image_CHW: Tensor, place: int) -> Tensor:
    """One patch's pixels in float64, row by row, channels last."""
    row, column = divmod(place, IMAGE_SIZE // PATCH_SIZE)
    pixels = [
        float(image_CHW[channel, row * PATCH_SIZE + y, column * PATCH_SIZE + x])
        for y in range(PATCH_SIZE) for x in range(PATCH_SIZE) for channel in range(3)
    ]  # fmt: skip
    return torch.tensor(pixels, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("norm_pixels", [True, False])
@torch.no_grad()
def test_the_loss_is_the_mean_error_on_masked_patches(loss: Literal["l1", "l2"], norm_pixels: bool):
    objective, model, batch, features = prepare(MaskedImageConfig(loss=loss, norm_pixels=norm_pixels))
    pixel_BKX = predict(objective, model, batch, features).double()
    errors = []
    for b, places in enumerate(masked_by_hand(features.relevance_BP)):
        for k, place in enumerate(places):
            target = patch_pixels(batch["image"][b], place)
            if norm_pixels:
                target = (target - target.mean()) / target.std()
            difference = pixel_BKX[b, k] - target
            errors += (difference.abs() if loss == "l1" else difference**2).tolist()
    assert len(errors) == 4 * NUM_MASKED * PIXELS
    assert float(objective(model, batch, features)[0]) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_patchify_and_unpatchify_are_inverse():
    image = build_batch()["image"]
    assert unpatchify(patchify(image, PATCH_SIZE), PATCH_SIZE).equal(image)
    assert patchify(image, PATCH_SIZE).shape == (4, NUM_PATCHES, PIXELS)


def test_normalised_targets_have_no_mean_and_unit_variance():
    target_BPX = patch_targets(3 + 5 * build_batch()["image"], PATCH_SIZE, True)
    torch.testing.assert_close(target_BPX.mean(dim=-1), torch.zeros(4, NUM_PATCHES), rtol=0, atol=1e-5)
    torch.testing.assert_close(target_BPX.var(dim=-1), torch.ones(4, NUM_PATCHES), rtol=1e-4, atol=0)


def test_a_patch_of_one_colour_has_a_finite_target():
    assert (patch_targets(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.7), PATCH_SIZE, True) == 0).all()


def with_pixels(image: Tensor, places: list[list[int]], value: float) -> Tensor:
    pixel_BPX = patchify(image, PATCH_SIZE)
    index = torch.tensor(places)[..., None].expand(-1, -1, PIXELS)
    return unpatchify(pixel_BPX.scatter(1, index, value), PATCH_SIZE)


@pytest.mark.parametrize("encode", ["visible", "mask_tokens"])
@pytest.mark.parametrize("value", [5.0, float("nan")])
@torch.no_grad()
def test_masked_pixels_cannot_influence_their_own_prediction(encode: Encode, value: float):
    objective, model, batch, features = prepare(MaskedImageConfig(encode=encode))
    before = predict(objective, model, batch, features)
    batch["image"] = with_pixels(batch["image"], masked_by_hand(features.relevance_BP), value)
    encoded = replace(model.encode(batch), summary_BD=features.summary_BD, token_BLD=features.token_BLD)
    after = predict(objective, model, batch, replace(encoded, relevance_BP=features.relevance_BP))
    assert after.equal(before)


@torch.no_grad()
def test_masking_features_leaks_as_its_documentation_says():
    objective, model, batch, features = prepare(MaskedImageConfig(encode="features"))
    before = predict(objective, model, batch, features)
    batch["image"] = with_pixels(batch["image"], masked_by_hand(features.relevance_BP), 5.0)
    after = predict(objective, model, batch, replace(model.encode(batch), relevance_BP=features.relevance_BP))
    assert not torch.allclose(after, before)


@EVERY_ENCODING
@torch.no_grad()
def test_every_visible_patch_influences_the_prediction(encode: Encode):
    objective, model, batch, features = prepare(MaskedImageConfig(encode=encode))
    before = predict(objective, model, batch, features)
    masked = masked_by_hand(features.relevance_BP)
    visible = [[place for place in range(NUM_PATCHES) if place not in row] for row in masked]
    for number in range(NUM_PATCHES - NUM_MASKED):
        changed = Batch(**{**batch, "image": with_pixels(batch["image"], [[row[number]] for row in visible], 5.0)})
        after = predict(objective, model, changed, replace(model.encode(changed), relevance_BP=features.relevance_BP))
        assert not torch.isclose(after, before).all(dim=-1).any()


@EVERY_ENCODING
@torch.no_grad()
def test_every_word_of_the_caption_guides_the_prediction(encode: Encode):
    objective, model, batch, features = prepare(MaskedImageConfig(encode=encode))
    before = predict(objective, model, batch, features)
    for place in range(3):
        token_BLD = features.token_BLD.clone()
        token_BLD[:, place] += torch.randn(token_BLD.shape[-1])
        after = predict(objective, model, batch, replace(features, token_BLD=token_BLD))
        assert not torch.isclose(after, before).all(dim=-1).any()
    after = predict(objective, model, batch, replace(features, summary_BD=features.summary_BD + torch.randn(12)))
    assert not torch.isclose(after, before).all(dim=-1).any()


@EVERY_ENCODING
@torch.no_grad()
def test_padding_does_not_guide_the_prediction(encode: Encode):
    objective, model, batch, features = prepare(MaskedImageConfig(encode=encode))
    before = predict(objective, model, batch, features)
    is_padding_BL = torch.arange(5) >= batch["length"][:, None]
    padded_BLD = torch.where(is_padding_BL[..., None], 9.0, features.token_BLD)
    assert predict(objective, model, batch, replace(features, token_BLD=padded_BLD)).equal(before)


@EVERY_ENCODING
@torch.no_grad()
def test_without_text_guidance_the_caption_is_not_read(encode: Encode):
    objective, model, batch, features = prepare(MaskedImageConfig(encode=encode, text_guided=False))
    before = predict(objective, model, batch, features)
    blind = replace(features, token_BLD=features.token_BLD + 1, summary_BD=features.summary_BD + 1)
    assert predict(objective, model, batch, blind).equal(before)


@EVERY_ENCODING
def test_only_the_parts_that_are_used_are_needed(encode: Encode):
    needs = MaskedImageConfig(encode=encode).build().needs
    assert needs - {"encoder_mask_token"} == {"image_decoder", "text", "text_guidance"}
    assert ("encoder_mask_token" in needs) == (encode == "mask_tokens")
    assert not MaskedImageConfig(encode=encode, text_guided=False).build().needs & {"text", "text_guidance"}


@pytest.mark.parametrize("mask", ["top", "bottom", "random"])
@torch.no_grad()
def test_attentive_masks_hide_what_the_caption_is_most_about(mask: Literal["top", "bottom", "random"]):
    objective, _, _, features = prepare(MaskedImageConfig(mask=mask))
    masked_BK, visible_BK = objective.split(features)
    score = features.relevance_BP
    is_above = score.gather(1, masked_BK).amin(1) > score.gather(1, visible_BK).amax(1)
    is_below = score.gather(1, masked_BK).amax(1) < score.gather(1, visible_BK).amin(1)
    assert (bool(is_above.all()), bool(is_below.all())) == (mask == "top", mask == "bottom")
