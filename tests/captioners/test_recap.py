"""ReCap and its augmentation loop in a world whose truth is known: what is retrieved, kept, refused and written down."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, ClassVar

import pytest
import torch
from encoders import TEXTS, save_own
from PIL import Image
from tiny_lms import build_lm
from toy_world import ToyPairs, build_encoder, make_pairs, noise, paint, toy_lm

from sycoca.captioners.alignment import AlignmentConfig, fit_image_to_text
from sycoca.captioners.captioner import Written, read_fit, write_fit
from sycoca.captioners.captioner_loading import LoadedCaptioner, load_captioner
from sycoca.captioners.datastore_files import load_datastore, save_datastore
from sycoca.captioners.embeddings import Pairs
from sycoca.captioners.encoder import FrozenEncoder, hash_weights, load_encoder
from sycoca.captioners.lm import CaptionLM
from sycoca.captioners.recap import ReCap, ReCapConfig, build_recap, fit_its_space
from sycoca.captioners.recap_augmentation import AugmentationConfig, AugmentedPairs, augment, mean_human_score, write_round
from sycoca.captioners.retriever import CaptionRetriever
from sycoca.captioners.sitta import Sitta, SittaConfig
from sycoca.captioners.sitta_maps import fit_token_map
from sycoca.captioners.token_vocabulary import TokenVocabulary
from sycoca.captioners.words import content_words
from sycoca.config import parse_config
from sycoca.finetune.closed_form import JudgedAugmentation, judge_captions
from sycoca.types import ConfigError, DataError, image_of
from tests.captioners import palette

NUM_TRAIN, NUM_HELD_OUT, K = 150, 40, 3


def parse_recap(**changes: Any) -> ReCapConfig:
    prompt = {"template": "recap", "num_items": K, "max_tokens": 30}
    tree = {"lm": {"name": "toy"}, "prompt": prompt, "generation": {"max_tokens": 6}}
    return parse_config(ReCapConfig, tree | changes, source="tests")


def make_recap(train: Pairs, config: ReCapConfig, *, encoder: FrozenEncoder, lm: CaptionLM | None = None) -> ReCap:
    return build_recap(encoder, lm or toy_lm(), train, fit_its_space(train, config), config)


def found_share(recap: ReCap, pairs: ToyPairs) -> float:
    """Of the content words in retrieved captions, those of the image's own captions."""
    found = [{word for text in texts for word in content_words(text)} for texts in recap.retrieve(pairs.image_NE, pairs.keys)]
    owned = [set(content_words(" ".join(pairs.texts[2 * row : 2 * row + 2]))) for row in range(len(pairs))]
    return sum(len(left & right) / len(left) for left, right in zip(found, owned, strict=True)) / len(owned)


def test_aligned_retrieval_finds_more_than_centred_and_that_more_than_raw_and_controls_least():
    shares = {}
    for space in ("aligned", "centred", "raw", "shuffled", "random"):
        of_seed = []
        for seed in range(3):
            encoder = build_encoder(seed)
            train, held_out = (make_pairs(encoder, num, seed=seed + num) for num in (NUM_TRAIN, NUM_HELD_OUT))
            of_seed.append(found_share(make_recap(train, parse_recap(space=space), encoder=encoder), held_out))
        shares[space] = median(of_seed)
    assert shares["aligned"] > shares["centred"] > shares["raw"]
    assert shares["centred"] > max(shares["shuffled"], shares["random"]) + 0.1


@pytest.mark.parametrize("space", ["aligned", "random"])
def test_nobody_retrieves_a_caption_of_its_own_image_not_even_another_sample_of_it(space):
    encoder = build_encoder()
    train = make_pairs(encoder, NUM_TRAIN, seed=0)
    keys, texts = [f"photo{row // 2}#{row % 2}" for row in range(NUM_TRAIN)], [f"{row}" for row in range(2 * NUM_TRAIN)]
    train = replace(train, keys=keys, texts=texts)
    recap = make_recap(train, parse_recap(space=space), encoder=encoder)
    source_of_text = {row.text: row.source for row in recap.retriever.datastore.rows}
    for key, texts in zip(train.keys, recap.retrieve(train.image_NE, train.keys), strict=True):
        assert len(texts) == K and image_of(key) not in {source_of_text[text] for text in texts}
    if space == "aligned":
        strangers = recap.retrieve(train.image_NE, [""] * NUM_TRAIN)
        assert any(source_of_text[texts[0]] == image_of(key) for key, texts in zip(train.keys, strangers))


def test_a_caption_says_what_it_was_made_of_and_no_weight_moves():
    encoder, lm = build_encoder(), build_lm()
    train = make_pairs(encoder, 40, seed=0)
    generation = {"method": "beam", "num_beams": 3, "num_return": 3, "max_tokens": 5}
    recap = make_recap(train, parse_recap(generation=generation, choose_by="aCLIP-S"), encoder=encoder, lm=lm)
    before = hash_weights(lm.model, ())
    written = recap.explain(paint(train.image_NE[:4]), train.keys[:4])
    assert before == hash_weights(lm.model, ())
    assert [row.retrieved for row in written] == recap.retrieve(train.image_NE[:4], train.keys[:4])
    for row in written:
        assert len(row.candidates) == len(row.scores) == 3
        assert row.caption == row.candidates[row.scores.index(max(row.scores))]
    with pytest.raises(ConfigError, match="there is one candidate"):
        parse_recap(choose_by="CLIP-S")
    without = make_recap(train, parse_recap(prompt={"template": "recap", "num_items": 0}), encoder=encoder)
    assert [row.retrieved for row in without.explain(paint(train.image_NE[:2]), ["", ""])] == [[], []]


def test_a_prompt_s_captions_are_drawn_from_a_longer_list():
    encoder = build_encoder()
    train = make_pairs(encoder, 40, seed=0)
    pool = {"template": "recap", "num_items": 2, "order": "sample", "pool": 7, "max_tokens": 30}
    best = make_recap(train, parse_recap(prompt={**pool, "num_items": 7}), encoder=encoder).retrieve(train.image_NE, train.keys)
    written = make_recap(train, parse_recap(prompt=pool), encoder=encoder).write(train.image_NE, train.keys)
    places = [[of_image.index(text) for text in row.retrieved] for row, of_image in zip(written, best, strict=True)]
    assert all(len(of_image) == 2 for of_image in places)
    assert {place for of_image in places for place in of_image} == set(range(7))


def test_parts_that_do_not_belong_together_are_refused_with_what_to_do():
    encoder, other = build_encoder(), build_encoder(1)
    train, config = make_pairs(encoder, 30, seed=0), parse_recap()
    found, strange = make_recap(train, config, encoder=encoder).retriever, make_pairs(other, 30, seed=0)
    with pytest.raises(DataError, match="encoder and aligner do not belong together"):
        CaptionRetriever(other, found.aligner, found.datastore, num=K)
    with pytest.raises(DataError, match="datastore was built with the encoder"):
        CaptionRetriever(encoder, found.aligner, make_recap(strange, config, encoder=other).retriever.datastore, num=K)
    every = CaptionRetriever(encoder, found.aligner, found.datastore, num=60).search(train.image_NE[:1], [""])
    assert sorted(every[0].tolist()) == list(range(60))
    again = fit_image_to_text(make_pairs(encoder, 20, seed=9), AlignmentConfig())
    with pytest.raises(DataError, match="build the datastore with the aligner"):
        CaptionRetriever(encoder, again, found.datastore, num=K)
    with pytest.raises(DataError, match="asks for 61 captions of a datastore of 60"):
        make_recap(train, parse_recap(prompt={"num_items": 61}), encoder=encoder)
    with pytest.raises(DataError, match="no captions, and an aligner is fitted on pairs"):
        make_recap(_WithoutTexts(train), config, encoder=encoder)
    with pytest.raises(DataError, match="what it is tested on"):
        make_recap(replace(train, split="val"), config, encoder=encoder)


class _WithoutTexts(ToyPairs):
    """Images without captions."""

    num_texts = 0

    def __init__(self, pairs: ToyPairs):
        super().__init__(pairs.keys, [], pairs.image_NE, pairs.text_NE[:0], pairs.fingerprint)


# Saved and loaded again


def save_parts(folder: Path) -> tuple[FrozenEncoder, CaptionLM, str]:
    """An encoder and a language model by name, as a folder keeps them."""
    lm: Any = build_lm()
    lm.model.save_pretrained(folder / "lm")
    lm.tokenizer.save_pretrained(str(folder / "lm"))
    return load_encoder(str(save_own(folder / "own"))), lm, str(folder / "lm")


def embed_noise(encoder: FrozenEncoder, num: int = 12) -> ToyPairs:
    texts = [TEXTS[row % len(TEXTS)] for row in range(2 * num)]
    image_NE = noise(num, encoder.embed_width, seed=1)
    return ToyPairs([f"a{row}" for row in range(num)], texts, image_NE, encoder.encode_text(texts), encoder.fingerprint)


@pytest.mark.parametrize("kind", ["recap", "sitta"])
def test_a_saved_captioner_writes_the_same_and_says_what_is_not_there_any_more(kind: str, tmp_path: Path):
    encoder, lm, name = save_parts(tmp_path)
    train, options = embed_noise(encoder), {"lm": {"name": name}, "generation": {"max_tokens": 5}}
    if kind == "recap":
        light: Any = make_recap(train, parse_recap(**options), encoder=encoder, lm=lm)
    else:
        tree = {**options, "prompt": {"template": "sitta", "num_items": 4}, "num_prompts": 3, "choose_by": "aCLIP-S"}
        config = parse_config(SittaConfig, tree, source="tests")
        vocabulary = TokenVocabulary(lm)
        token_map = fit_token_map(encoder, train, vocabulary, config.token_map)
        light = Sitta(encoder, vocabulary, token_map, fit_image_to_text(train, AlignmentConfig()), config)
    light.save(tmp_path / "captioner")
    write_fit(tmp_path / "captioner", {"fit_seconds": 1.5})
    images = [Image.effect_noise((20, 30), sigma).convert("RGB") for sigma in (10, 200, 90)]
    loaded = load_captioner(tmp_path / "captioner")
    assert loaded.explain(images) == LoadedCaptioner(light).explain(images)
    assert loaded.caption(images[:1]) == loaded.caption(images)[:1] and loaded.caption([]) == []
    assert read_fit(tmp_path / "captioner") == {"fit_seconds": 1.5} and read_fit(tmp_path) == {}
    save_own(tmp_path / "own", seed=5)
    with pytest.raises(DataError, match="Fit the captioner again"):
        load_captioner(tmp_path / "captioner")
    (tmp_path / "captioner" / "captioner.json").write_text('{"kind": "captioner", "captioner": "oracle"}')
    with pytest.raises(DataError, match="of the kind 'oracle'; expected one of"):
        load_captioner(tmp_path / "captioner")
    with pytest.raises(DataError, match="no captioner there"):
        load_captioner(tmp_path)


# The augmentation loop


class Oracle(ReCap):
    """Knows the truth of half of the training images, and says nonsense of the others; in other words every round."""

    truth: ClassVar[dict[str, str]]

    def write(self, image_BE: torch.Tensor, keys: Any) -> Any:
        written = super().write(image_BE, keys)
        generator = Random(len(self.retriever.datastore))
        words = [self.truth[key].split() for key in keys]
        texts = [" ".join(generator.sample(of_image, len(of_image))) for of_image in words]
        return [replace(row, caption=text, candidates=[text], scores=[0.0]) for row, text in zip(written, texts, strict=True)]


def make_oracle(seed: int = 0) -> tuple[Oracle, ToyPairs, list[str]]:
    """With the training pairs, and the keys whose captions are true."""
    encoder = build_encoder(seed)
    train = make_pairs(encoder, 60, seed=seed)
    plain = make_recap(train, parse_recap(), encoder=encoder)
    oracle = Oracle(toy_lm(), plain.retriever, plain.config)
    whole = [" ".join(dict.fromkeys(content_words(" ".join(train.texts[2 * row : 2 * row + 2])))) for row in range(60)]
    Oracle.truth = {key: whole[row if row % 2 else (row + 31) % 60] for row, key in enumerate(train.keys)}
    return oracle, train, train.keys[1::2]


def test_a_round_keeps_true_captions_that_reach_the_human_mean_and_drops_the_others():
    oracle, train, true_keys = make_oracle()
    config = AugmentationConfig()
    kept, figures = write_round(oracle, train, config, known=[])
    assert figures["num_written"] == 60 and figures["threshold"] == mean_human_score(oracle.retriever.aligner, train, config)
    assert len(kept) > 20 and all(item.score >= figures["threshold"] for item in kept)
    share = sum(train.keys[item.image] in true_keys for item in kept) / len(kept)
    assert share > 0.85
    again, _ = write_round(oracle, train, config, known=kept)
    assert again == []
    some, _ = write_round(oracle, train, AugmentationConfig(num_images=7), known=[])
    assert len(some) <= 7


def test_the_loop_adds_synthetic_rows_and_pairs_until_the_judge_sees_no_gain(tmp_path: Path):
    oracle, train, _ = make_oracle()
    num_rows = len(oracle.retriever.datastore)
    marks = iter([10.0, 12.0, 11.0, 99.0])
    best = augment(oracle, train, AugmentationConfig(max_rounds=9), judge=lambda recap: next(marks), log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["validation"]) for line in lines] == [(0, 10.0), (1, 12.0), (2, 11.0)]
    datastore = best.retriever.datastore
    assert lines[2]["num_added"] > 10, "it ended by the judge, not for want of captions"
    assert lines[1]["num_added"] > 20 and lines[1]["num_rows"] == num_rows + lines[1]["num_added"] == len(datastore)
    synthetic = [row for row in datastore.rows if row.origin == "synthetic"]
    assert len(synthetic) == lines[1]["num_added"]
    assert all(row.score >= lines[1]["threshold"] and row.source in train.keys for row in synthetic)
    assert best.retriever.aligner.num_pairs == train.num_texts + len(synthetic)
    save_datastore(datastore, tmp_path / "store")
    assert load_datastore(tmp_path / "store").inspect()["origins"]["synthetic"] == len(synthetic)


def test_the_judge_reads_held_out_images_of_every_shard_or_the_first_ones(tmp_path: Path):
    """Of a captioner that is right about the images of the first shard alone."""
    store = palette.embed_images(tmp_path, "val")
    right = set(next(iter(store.blocks())).keys)

    class HalfRight:
        def write(self, image_BE: torch.Tensor, keys: list[str]) -> list[Written]:
            numbers = [int(key.removeprefix("k")) for key in keys]
            texts = [palette.captions_of(n)[0] if f"k{n}" in right else "something else" for n in numbers]
            assert torch.equal(image_BE, palette.build_palette().encode_image(palette.pixels(numbers)).cpu())
            return [Written(text, [], [text], [0.0]) for text in texts]

    def judge(num_judged: int | None) -> float:
        config = JudgedAugmentation(judge="ROUGE-L", num_judged=num_judged, batch_size=4)
        return judge_captions(store, config, HalfRight())  # pyright: ignore

    assert 0 < len(right) < len(store)
    assert judge(None) == pytest.approx(100 * len(right) / len(store)) and judge(len(right)) == pytest.approx(100)


def test_random_captions_are_as_many_and_of_other_images(tmp_path: Path):
    oracle, train, _ = make_oracle()
    expected = len(write_round(oracle, train, AugmentationConfig(), known=[])[0])
    config = AugmentationConfig(captions="random", max_rounds=1)
    marks = iter([1.0, 2.0])
    best = augment(oracle, train, config, judge=lambda recap: next(marks), log=tmp_path / "log.jsonl")
    synthetic = [row for row in best.retriever.datastore.rows if row.origin == "synthetic"]
    assert len(synthetic) == expected and all(math.isnan(row.score) for row in synthetic)
    own = {(row.source, row.text) for row in best.retriever.datastore.rows if row.origin == "human"}
    assert {row.text for row in synthetic} <= {text for _, text in own}
    assert sum((row.source, row.text) in own for row in synthetic) <= 2, "equal texts of two images at most"


def test_what_is_added_stands_behind_its_own_image_in_any_block():
    oracle, train, _ = make_oracle()
    kept, _ = write_round(oracle, train, AugmentationConfig(), known=[])
    pairs = AugmentedPairs(train, kept)
    seen = []
    for block in pairs.blocks():
        owners = [block.keys[image] for image in block.image_of_text_N.tolist()]
        assert len(block.texts) == len(block.text_NE) == len(owners)
        seen += list(zip(owners, block.texts))
    human = [(train.keys[row // 2], text) for row, text in enumerate(train.texts)]
    assert sorted(seen) == sorted([*human, *((train.keys[item.image], item.text) for item in kept)])
    assert pairs.num_texts == len(seen)
