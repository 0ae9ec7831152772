"""The model as a whole: its embeddings, its pools by hand, and that it builds what is needed and nothing else."""

import pytest
import torch
from builders import ABLATION_ROWS, ALL_PARTS, EMBED_WIDTH, build_batch, build_model
from torch import Tensor

from sycoca.models.sycoca import SyCoCa
from sycoca.train.task import needed_parts
from sycoca.types import ConfigError


def pooled_by_hand(model: SyCoCa, pool: str, patch_BPD: Tensor, class_BD: Tensor) -> Tensor:
    weight = model.image_projection.weight
    if pool == "max":
        return torch.stack([(patch_BPD[:, p] @ weight.T) for p in range(patch_BPD.shape[1])]).max(dim=0).values
    if pool == "mean":
        return sum(patch_BPD[:, p] for p in range(patch_BPD.shape[1])) / patch_BPD.shape[1] @ weight.T
    return class_BD @ weight.T


@pytest.mark.parametrize("pool", ["cls", "mean", "max"])
@torch.no_grad()
def test_the_image_embedding_is_the_projected_pool(pool: str):
    model, batch = build_model(pool=pool), build_batch()
    expected = pooled_by_hand(model, pool, *model.vision(batch["image"]))
    torch.testing.assert_close(model.encode_image(batch["image"]), expected)


@torch.no_grad()
def test_the_attention_pool_sees_all_patches_in_any_order():
    model, batch = build_model(pool="attention"), build_batch()
    patch_BPD, class_BD = model.vision(batch["image"])
    expected = model.project_image(patch_BPD, class_BD)
    torch.testing.assert_close(model.project_image(patch_BPD.flip(1), class_BD), expected)
    for place in range(patch_BPD.shape[1]):
        changed_BPD = patch_BPD.clone()
        changed_BPD[:, place] += torch.randn(8)
        assert not torch.isclose(model.project_image(changed_BPD, class_BD), expected).all(dim=-1).any()


@torch.no_grad()
def test_training_embeddings_are_the_inference_embeddings_at_unit_norm():
    model, batch = build_model(), build_batch()
    features = model.encode(batch)
    for unit_BE, raw_BE in (
        (features.image_BE, model.encode_image(batch["image"])),
        (features.text_BE, model.encode_text(batch["token"], batch["length"])),
    ):
        assert unit_BE.shape == (4, EMBED_WIDTH)
        torch.testing.assert_close(unit_BE, raw_BE / raw_BE.square().sum(dim=-1, keepdim=True).sqrt())


@torch.no_grad()
def test_embeddings_are_float32_under_autocast():
    model, batch = build_model(), build_batch()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode(batch)
        raw = model.encode_image(batch["image"])
    assert features.image_BE.dtype == features.text_BE.dtype == raw.dtype == torch.float32
    torch.testing.assert_close(features.text_BE.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("row", ABLATION_ROWS)
def test_parts_that_no_objective_needs_are_not_built(row: str):
    parts = needed_parts(ABLATION_ROWS[row])
    model = build_model(parts)
    assert (model.text_decoder is not None) == ("text_decoder" in parts)
    assert (model.image_decoder is not None) == ("image_decoder" in parts)
    assert (model.image_projection is not None) == (model.text_projection is not None) == ("contrast" in parts)
    assert (model.text.summary_D is not None) == bool(parts & {"contrast", "text_guidance"})
    assert (model.vision.hide is not None) == ("encoder_mask_token" in parts)


def test_an_image_decoder_alone_needs_no_text():
    model = build_model({"image_decoder"})
    assert model.text is None and model.encode(build_batch()).patch_BPD.isfinite().all()


def test_locking_a_tower_that_is_not_built_is_refused():
    with pytest.raises(ConfigError, match=r"model\.locked.*text"):
        build_model({"image_decoder"}, locked=["text"])


def test_a_model_with_all_parts_round_trips_through_its_weights():
    model, other, batch = build_model(ALL_PARTS), build_model(ALL_PARTS, seed=1), build_batch()
    assert not torch.allclose(model.encode_image(batch["image"]), other.encode_image(batch["image"]))
    other.load_state_dict(model.state_dict())
    assert model.encode_image(batch["image"]).equal(other.encode_image(batch["image"]))
