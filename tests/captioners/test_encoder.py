"""Frozen encoders of three libraries: equal to what the library itself gives, and never trained."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from builders import EMBED_WIDTH, IMAGE_SIZE, MAX_TOKENS, NUM_PATCHES, VISION_WIDTH
from encoders import TEXTS, save_open_clip, save_own, save_transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

import sycoca
from sycoca.captioners.encoder import FrozenEncoder, load_encoder
from sycoca.types import CheckpointError, ConfigError, DualEncoder

SAVE = {"": save_own, "open_clip:local-dir:": save_open_clip, "transformers:": save_transformers}
IMAGE_BCHW = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {prefix: save(tmp_path_factory.mktemp("encoder") / "weights") for prefix, save in SAVE.items()}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, FrozenEncoder]:
    return {prefix: load_encoder(f"{prefix}{folder}") for prefix, folder in folders.items()}


@pytest.mark.parametrize("prefix", SAVE)
def test_every_encoder_gives_raw_float32_embeddings_without_a_graph(prefix: str, encoders):
    encoder = encoders[prefix]
    assert isinstance(encoder, DualEncoder)
    image_BE, text_NE = encoder.encode_image(IMAGE_BCHW), encoder.encode_text(TEXTS)
    assert image_BE.shape == (2, EMBED_WIDTH) and text_NE.shape == (3, EMBED_WIDTH)
    assert encoder.encode_text([]).shape == (0, EMBED_WIDTH)
    for rows in (image_BE, text_NE, encoder.encode_patches(IMAGE_BCHW)):
        assert rows.dtype == torch.float32 and not rows.requires_grad and rows.isfinite().all()
        assert not torch.allclose(rows.norm(dim=-1), torch.ones(()))
    assert (encoder.embed_width, encoder.patch_width) == (EMBED_WIDTH, VISION_WIDTH)
    assert not any(parameter.requires_grad for parameter in encoder._towers.module.parameters())
    assert not encoder._towers.module.training


@pytest.mark.parametrize("prefix", SAVE)
def test_a_text_does_not_depend_on_the_texts_beside_it(prefix: str, encoders, monkeypatch: pytest.MonkeyPatch):
    whole_NE = encoders[prefix].encode_text(TEXTS)
    monkeypatch.setattr("sycoca.captioners.encoder.TEXT_BATCH", 1)
    torch.testing.assert_close(encoders[prefix].encode_text(TEXTS), whole_NE)


def test_a_checkpoint_of_ours_encodes_as_it_does_elsewhere(folders, encoders):
    encoder, subject = encoders[""], sycoca.load(folders[""])
    assert torch.equal(encoder.encode_image(IMAGE_BCHW), subject.encode_image(IMAGE_BCHW))
    assert torch.equal(encoder.encode_text(TEXTS), subject.encode_text(TEXTS))
    assert torch.equal(encoder.encode_patches(IMAGE_BCHW), subject.encode_patches(IMAGE_BCHW))
    assert encoder.logit_scale == pytest.approx(np.exp(1.5))


def test_an_open_clip_model_encodes_as_open_clip_does(folders, encoders):
    encoder = encoders["open_clip:local-dir:"]
    name = f"local-dir:{folders['open_clip:local-dir:']}"
    model: Any = open_clip.create_model(name).eval()
    model.visual.output_tokens = True
    with torch.no_grad():
        image_BE, patch_BPD = model.visual(IMAGE_BCHW)
        text_NE = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
        states_BPD = encoder.encode_patches(IMAGE_BCHW)
        torch.testing.assert_close(encoder.encode_image(IMAGE_BCHW), image_BE)
        torch.testing.assert_close(encoder.encode_text(TEXTS), text_NE)
        assert states_BPD.shape == (2, 1 + NUM_PATCHES, VISION_WIDTH)
        normed_BPD = model.visual.ln_post(states_BPD)
        torch.testing.assert_close(normed_BPD[:, 1:], patch_BPD)
        torch.testing.assert_close(normed_BPD[:, 0] @ model.visual.proj, image_BE)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_a_transformers_clip_encodes_as_transformers_does(folders, encoders):
    encoder, folder = encoders["transformers:"], folders["transformers:"]
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=IMAGE_BCHW)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(encoder.encode_image(IMAGE_BCHW), dim=-1), out.image_embeds)
    torch.testing.assert_close(unit(encoder.encode_text(TEXTS), dim=-1), out.text_embeds)
    torch.testing.assert_close(encoder.encode_patches(IMAGE_BCHW), out.vision_model_output.last_hidden_state)
    cosines = unit(encoder.encode_text(TEXTS), dim=-1) @ unit(encoder.encode_image(IMAGE_BCHW), dim=-1).T
    torch.testing.assert_close(encoder.logit_scale * cosines, out.logits_per_text)


@pytest.mark.parametrize("prefix", ["open_clip:local-dir:", "transformers:"])
def test_images_are_prepared_as_the_library_prepares_them(prefix: str, folders, encoders):
    smooth = Image.linear_gradient("L").resize((40, 28))
    image = Image.merge("RGB", (smooth, smooth.transpose(Image.Transpose.FLIP_LEFT_RIGHT), smooth.rotate(90)))
    if prefix == "transformers:":
        expected = CLIPImageProcessor.from_pretrained(folders[prefix])(image, return_tensors="pt")["pixel_values"][0]
    else:
        prepare: Any = open_clip.create_model_and_transforms(f"local-dir:{folders[prefix]}")[2]
        expected = prepare(image)
    found = encoders[prefix].transform(image)
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.03  # a level of 255 is 0.015 here; another crop or mean gives tenths


def test_an_autocast_region_does_not_change_embeddings(encoders):
    encoder = encoders["open_clip:local-dir:"]
    expected = encoder.encode_text(TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode_text(TEXTS), expected)


@pytest.mark.parametrize("prefix", ["", "open_clip:local-dir:"])
def test_the_fingerprint_is_of_the_weights_and_the_transform(prefix: str, tmp_path: Path, encoders):
    same, other = (SAVE[prefix](tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert load_encoder(f"{prefix}{same}").fingerprint == encoders[prefix].fingerprint
    assert load_encoder(f"{prefix}{other}").fingerprint != encoders[prefix].fingerprint
    if prefix:
        config = same / "open_clip_config.json"
        config.write_text(config.read_text().replace("squash", "shortest"))
        assert load_encoder(f"{prefix}{same}").fingerprint != encoders[prefix].fingerprint


def test_the_logit_scale_is_clamped_as_in_training(tmp_path: Path):
    assert load_encoder(str(save_own(tmp_path / "own", log_scale=9.0))).logit_scale == 100.0


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", CheckpointError, "for other encoders write open_clip:"),
        ("open_clip:ViT-B-32", ConfigError, "expected MODEL/WEIGHTS.*openai"),
        ("open_clip:ViT-Z-1", ConfigError, "no such model"),
        ("open_clip:ViT-B-32/nothing", CheckpointError, "not a known tag"),
        ("open_clip:local-dir:nowhere", CheckpointError, "not found"),
        ("transformers:./nowhere", CheckpointError, "cannot load"),
    ],
)
def test_a_name_that_means_nothing_says_what_was_expected(name: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        load_encoder(name)


def test_encoders_without_a_shared_space_or_another_model_type_are_refused(tmp_path: Path, folders):
    with pytest.raises(CheckpointError, match="without contrast"):
        load_encoder(str(save_own(tmp_path / "own", parts=["text", "text_decoder"])))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2'"):
        load_encoder(f"transformers:{tmp_path}")
    config = folders["open_clip:local-dir:"] / "open_clip_config.json"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "open_clip_config.json").write_text(config.read_text().replace("squash", "longest"))
    weights = (folders["open_clip:local-dir:"] / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "odd" / "open_clip_model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="'longest'"):
        load_encoder(f"open_clip:local-dir:{tmp_path / 'odd'}")
