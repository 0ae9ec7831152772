"""The small language model: what it is shown, what it learns, and that its folder is read as any other."""

from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from pairs_data import quiet_run  # noqa: F401  a fixture

from sycoca.captioners.lm_loading import load_lm
from sycoca.captioners.prompt import TEMPLATES, PromptBatch, pad_prompts
from sycoca.captioners.words import content_words
from sycoca.config import load_config, parse_config
from sycoca.data.position import PositionTracker
from sycoca.data.tokenizer import train_prompt_tokenizer
from sycoca.finetune.language_model import LanguageModelTask, TrainLMConfig, build_small_lm, train_language_model
from sycoca.finetune.numbered import Order
from sycoca.finetune.prompted_captions import CaptionTable, PromptedBatches, PromptedConfig, collate_prompted, draw_items
from sycoca.generation import GenerationConfig
from sycoca.train.optim import build_optimizer
from sycoca.types import CheckpointError, ConfigError, DataError

ROOT = Path(__file__).parents[2]
CAPTIONS = {
    "1.jpg": ["a dog runs on the grass .", "an animal outside ."],
    "2.jpg": ["two cats sleep in the sun .", "sleeping pets ."],
    "3.jpg": ["a red bird flies .", "something in the sky ."],
}
SHARED: dict[str, Any] = {"batch_size": 4, "prompt": {"num_items": 2, "max_tokens": 40}, "max_tokens": 12}


def small_config(folder: Path, **changes: Any) -> TrainLMConfig:
    path = folder / "captions.txt"
    path.write_text("\n".join(f"{image}\t{text}" for image, texts in CAPTIONS.items() for text in texts), encoding="utf-8")
    tree = {
        "run": {"folder": str(folder / "run"), "precision": "fp32", "tensorboard": False, "log_every": 60},
        "lm": {"width": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
        "data": {"texts": [str(path)], **SHARED},
        "optim": {"lr": 1e-2, "num_steps": 3, "warmup_steps": 10, "weight_decay": 0.0},
        "evaluate": {"texts": [str(path)], "every": 1000},
    }
    for name, change in changes.items():
        tree[name] = tree[name] | change
    return parse_config(TrainLMConfig, tree, source="tests")


def small_lm(folder: Path, config: TrainLMConfig):
    from transformers import AutoTokenizer

    texts = [text for texts in CAPTIONS.values() for text in texts]
    train_prompt_tokenizer([*texts, TEMPLATES["smallcap"].fill([""])], folder / "words")
    torch.manual_seed(0)
    return build_small_lm(config, AutoTokenizer.from_pretrained(str(folder / "words")))


def test_the_other_captions_of_a_prompt_never_hold_the_caption_itself():
    table = CaptionTable({**CAPTIONS, "4.jpg": ["a red bird flies .", "a red bird flies ."]})
    for index in range(len(table)):
        for share in (0.0, 0.5, 1.0):
            for seed in range(20):
                others = table.draw_others(index, 3, Random(seed), same_image_share=share)
                assert table.texts[index] not in others and len(others) <= 3


def test_a_share_of_the_items_are_of_the_same_image():
    table = CaptionTable(CAPTIONS)
    drawn = [table.draw_others(0, 1, Random(seed), same_image_share=0.5) for seed in range(400)]
    own = sum(items == [CAPTIONS["1.jpg"][1]] for items in drawn)
    assert 160 < own < 240
    assert all(CAPTIONS["1.jpg"][1] not in table.draw_others(0, 2, Random(s), same_image_share=0.0) for s in range(50))


def test_a_share_of_the_prompts_is_made_of_content_words_of_the_captions_that_would_stand_there():
    changes = {"words": {"template": "sitta", "num_items": 3, "max_tokens": 20}, "words_share": 0.5, "prompted_share": 0.8}
    config = parse_config(PromptedConfig, {"texts": [], **SHARED, **changes}, source="tests")
    table, drawn = CaptionTable(CAPTIONS), Counter()
    for seed in range(300):
        items, prompt = draw_items(table, 0, config, Random(seed))
        drawn[prompt.template if items else "none"] += 1
        if prompt.template == "sitta":
            others = {word for text in table.texts[1:] for word in content_words(text)}
            assert len(items) == len(set(items)) <= 3 and set(items) <= others
    assert 40 < drawn["none"] < 80 and 90 < drawn["sitta"] < 150 and 90 < drawn["smallcap"] < 150
    for wrong in ({"words_share": 0.0}, {"words": None}, {"prompt": {"num_items": 2, "max_tokens": 9}}):
        with pytest.raises(ConfigError, match="words"):
            parse_config(PromptedConfig, {"texts": [], **SHARED, **changes, **wrong}, source="tests")


def test_a_share_of_the_prompts_holds_the_caption_itself_where_that_is_asked_for():
    def hold(own_share: float) -> list[bool]:
        shares = {"prompted_share": 1.0, "own_share": own_share}
        config = parse_config(PromptedConfig, {"texts": [], **SHARED, **shares}, source="tests")
        return [table.texts[0] in draw_items(table, 0, config, Random(seed))[0] for seed in range(200)]

    table = CaptionTable(CAPTIONS)
    assert not any(hold(0.0)) and all(hold(1.0)) and 70 < sum(hold(0.5)) < 130


def test_a_batch_holds_prompt_and_caption_apart_and_only_the_caption_is_learnt(tmp_path: Path):
    config = small_config(tmp_path)
    lm, table = small_lm(tmp_path, config), CaptionTable(CAPTIONS)
    always = config.data.model_copy(update={"prompted_share": 1.0})
    batch = collate_prompted(table, [0, 3], lm, always, generators=[Random(1), Random(2)])
    first = lm.tokenizer.decode(batch["prompt"][0][batch["prompt_is_real"][0]])
    assert first.startswith("[BOS] similar images show \n \n") and first.endswith("this image shows")
    assert [lm.decode_caption(row) for row in batch["token"].tolist()] == [table.texts[0], table.texts[3]]
    assert [row[length - 1] for row, length in zip(batch["token"].tolist(), batch["length"].tolist())] == [lm.eos] * 2
    task = LanguageModelTask(lm.eval(), is_bf16=False)
    loss, _ = task(batch)
    prompt = PromptBatch(batch["prompt"], batch["prompt_is_real"])
    expected = -lm.log_probs(prompt, batch["token"], batch["length"]).sum() / batch["length"].sum()
    assert loss.item() == pytest.approx(expected.item())
    plain = config.data.model_copy(update={"prompted_share": 0.0})
    bare = collate_prompted(table, [0], lm, plain, generators=[Random(1)])
    assert bare["prompt"].tolist() == [[lm.tokenizer.bos_token_id]]


def test_batches_go_on_where_they_stopped_and_refuse_another_order(tmp_path: Path):
    config = small_config(tmp_path)
    lm, table = small_lm(tmp_path, config), CaptionTable(CAPTIONS)

    def batches(resume: Any = None, *, seed: int = 0) -> PromptedBatches:
        return PromptedBatches(table, lm, config.data, Order(seed, config.data.batch_size, 0, 1), resume=resume)

    whole = list(islice(batches(), 5))
    assert sorted(key for batch in whole[:3] for key in batch["key"]) == sorted(table.keys * 2), "two epochs of six"
    tracker = PositionTracker()
    for batch in whole[:2]:
        tracker.update(batch["position"])
    for batch, again in zip(whole[2:], batches(tracker.state())):
        assert batch["key"] == again["key"] and torch.equal(batch["prompt"], again["prompt"])
    with pytest.raises(CheckpointError, match="another order"):
        batches(tracker.state(), seed=1)


def test_tied_weights_are_optimised_once_and_saved_once(tmp_path: Path):
    task = LanguageModelTask(small_lm(tmp_path, small_config(tmp_path)), is_bf16=False)
    groups = build_optimizer(task, small_config(tmp_path).optim).param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(task.parameters()))
    state = task.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = LanguageModelTask(small_lm(tmp_path, small_config(tmp_path)), is_bf16=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), task.parameters(), strict=True))


@pytest.mark.slow
def test_a_few_captions_are_learnt_and_their_prompts_are_read(tmp_path: Path, quiet_run: None):  # noqa: F811
    config = small_config(
        tmp_path, optim={"num_steps": 240}, data={"prompted_share": 0.7, "same_image_share": 1.0, "batch_size": 6}
    )
    result = train_language_model(config)
    assert result["note"] and float(result["perplexity_behind_own"]) < 1.3 < float(result["perplexity_behind_others"])
    assert float(result["perplexity_behind_itself"]) > 2, "it never met a caption in its own prompt"
    lm = load_lm(str(result["lm"]))
    texts = [text for texts in CAPTIONS.values() for text in texts]
    plain = pad_prompts([lm.encode_prompt("")], lm.pad)
    beam = GenerationConfig(method="beam", num_beams=6, num_return=6, max_tokens=12, length_penalty=0.0)
    [written] = lm.decode_texts(lm.generate(plain, beam))
    assert sorted(written) == sorted(texts), "all captions, and no others, are likely"
    prompt = pad_prompts([lm.encode_prompt(TEMPLATES["smallcap"].fill([text])) for text in texts], lm.pad)
    behind = [row[0] for row in lm.decode_texts(lm.generate(prompt, GenerationConfig(max_tokens=12)))]
    assert behind == [other for first, second in CAPTIONS.values() for other in (second, first)]


def test_the_configurations_can_be_read():
    for path in sorted((ROOT / "configs/captioner").glob("lm_*.yaml")):
        config = load_config(TrainLMConfig, path)
        assert config.lm.width % config.lm.num_heads == 0 and config.evaluate.texts


def test_what_cannot_be_trained_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lm.num_heads: a width of 32"):
        small_lm(tmp_path, small_config(tmp_path, lm={"num_heads": 5}))
    with pytest.raises(DataError, match="two captions or more"):
        CaptionTable({"1.jpg": ["a dog"]})
    config = PromptedConfig(texts=[], batch_size=1)
    with pytest.raises(DataError, match="too few for 9 processes"):
        PromptedBatches(CaptionTable(CAPTIONS), None, config, Order(0, 1, 0, 9), resume=None)  # pyright: ignore
