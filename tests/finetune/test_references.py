"""The reward of self-critical training: whose references it compares with, and what an end is worth."""

from pathlib import Path

import pytest
from pairs_data import scenes, train_data

from sycoca.data.pipeline import DataConfig
from sycoca.data.scenes import invent_scene
from sycoca.evaluation.cider import CiderScorer
from sycoca.evaluation.ptb_tokenizer import tokenize_caption
from sycoca.finetune.references import END, CiderReward, read_references
from sycoca.types import DataError
from tests.data.shard_maker import encode_image, make_json, write_shard

__all__ = ["scenes"]
REFERENCES = {
    "a": ("a dog runs on the grass", "a brown dog is running"),
    "b": ("two cats sleep on a sofa", "cats on a sofa"),
    "c": ("a man rides a horse", "a man on a horse on a hill"),
}


def test_an_ended_caption_is_rated_with_its_end_as_a_word_of_both_sides():
    ended = {key: [f"{text} {END}" for text in texts] for key, texts in REFERENCES.items()}
    expected = CiderScorer(ended).score(f"a dog is running {END}", "a")
    assert CiderReward(REFERENCES)("A dog is running.", "a", is_ended=True) == pytest.approx(expected)
    assert expected > 0


def test_breaking_off_is_worth_less_than_ending():
    reward = CiderReward(REFERENCES)
    assert reward("a man on a horse on a", "c", is_ended=False) < reward("a man on a horse on a hill", "c", is_ended=True)
    assert reward("cats on a sofa", "b", is_ended=False) < reward("cats on a sofa", "b", is_ended=True)
    assert reward("", "b", is_ended=False) == 0.0


def test_a_sample_s_references_are_its_image_s():
    reward = CiderReward(REFERENCES)
    assert reward("cats on a sofa", "b#4", is_ended=True) == reward("cats on a sofa", "b", is_ended=True)
    assert reward("cats on a sofa", "a", is_ended=True) < reward("cats on a sofa", "b", is_ended=True)


def test_every_caption_of_every_training_image_is_a_reference(scenes: Path):
    found = read_references(train_data(scenes))
    assert len(found) == 12
    captions = [caption.text for caption in invent_scene(0, 3, size=32).captions]
    assert found["train0000003"] == tuple(map(tokenize_caption, captions))


def test_captions_of_one_image_in_several_samples_are_joined_and_bad_samples_left_out(tmp_path: Path):
    image = encode_image()
    rows = {"x#0": make_json(caption="One dog."), "x#1": make_json(caption="two dogs"), "y": b"not json", "z": make_json()}
    members = [(f"{key}.{name}", data) for key, text in rows.items() for name, data in (("jpg", image), ("json", text))]
    write_shard(tmp_path / "0.tar", members)
    config = DataConfig(shards=[str(tmp_path)], batch_size=1)
    assert read_references(config) == {"x": ("one dog", "two dogs")}


def test_shards_without_captions_are_refused(tmp_path: Path):
    write_shard(tmp_path / "0.tar", [("a.jpg", encode_image()), ("a.json", make_json())])
    with pytest.raises(DataError, match="no captions to compare with"):
        read_references(DataConfig(shards=[str(tmp_path)], batch_size=1))
