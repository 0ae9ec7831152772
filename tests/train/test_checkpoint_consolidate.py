"""One file of weights from a checkpoint: the newest or the average, and never from a damaged one."""

from pathlib import Path

import pytest
import torch
from builders import ALL_PARTS, IMAGE_SIZE, MAX_TOKENS, model_config
from safetensors.torch import load_file
from toy_run import run_toy, settings

from sycoca.data.tokenizer import build_tokenizer
from sycoca.data.transforms import TransformConfig
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import SyCoCa
from sycoca.pretrained import MODEL_PREFIX, PretrainedConfig, save_description
from sycoca.train.checkpoint.consolidate import compare_forward, consolidate
from sycoca.types import CheckpointError


def test_the_newest_or_the_averaged_weights_are_written(tmp_path: Path):
    run_toy(settings(tmp_path, num_steps=3, average_decay=0.9))
    last = tmp_path / "checkpoints/last"
    for choice, name in (("newest", "state/newest.safetensors"), ("averaged", "model.safetensors")):
        found = consolidate(last, tmp_path / f"{choice}.safetensors", choice=choice)
        assert found["step"] == 3 and found["weights"] == choice and found["engine"] == "plain"
        assert (tmp_path / f"{choice}.safetensors").read_bytes() == (last / name).read_bytes()
    newest, averaged = (load_file(tmp_path / f"{choice}.safetensors") for choice in ("newest", "averaged"))
    assert not torch.equal(newest["first.weight"], averaged["first.weight"])


def test_what_a_checkpoint_does_not_hold_is_refused(tmp_path: Path):
    run_toy(settings(tmp_path, num_steps=1))
    last, out = tmp_path / "checkpoints/last", tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match="holds no running average of the weights; use --weights newest"):
        consolidate(last, out, choice="averaged")
    with pytest.raises(CheckpointError, match="--from-shards gives the newest weights of a ZeRO checkpoint only"):
        consolidate(last, out, choice="newest", from_shards=True)
    (last / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors has 7 bytes"):
        consolidate(last, out, choice="newest")
    assert not out.exists()


def test_the_forward_pass_is_compared_where_a_model_is_described(tmp_path: Path):
    tokenizer, parts = build_tokenizer("clip"), sorted(ALL_PARTS)
    model = SyCoCa(model_config(), vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=ALL_PARTS)
    config = PretrainedConfig(
        model=model_config(), parts=parts, transform=TransformConfig(size=IMAGE_SIZE), relevance=RelevanceConfig(),
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    save_description(tmp_path, tokenizer, config)
    weights = {MODEL_PREFIX + name: value for name, value in model.state_dict().items()}
    assert compare_forward(tmp_path, weights, dict(weights))
    name = next(name for name in weights if name.endswith("bias") and "vision" in name)
    with pytest.raises(CheckpointError, match="other features"):
        compare_forward(tmp_path, weights, {**weights, name: weights[name] + 1})
