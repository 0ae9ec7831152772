"""SmallCap: who is retrieved, what a batch is, what a swap and a file keep, and that patches are looked at."""

from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch

from sycoca.captioners.datastore_files import rows_of_texts
from sycoca.captioners.embeddings import Reading
from sycoca.captioners.encoder import hash_weights
from sycoca.captioners.lm import CaptionLM, Condition
from sycoca.captioners.lm_loading import LMConfig, load_lm
from sycoca.captioners.patches import EncodedPatches, StoredPatches, store_patches
from sycoca.captioners.prompt import PromptBatch, PromptConfig
from sycoca.captioners.smallcap import SmallCap, SmallCapConfig, build_smallcap
from sycoca.captioners.text_rows import Row
from sycoca.config import parse_config
from sycoca.evaluation.caption_metrics import score_captions
from sycoca.finetune.numbered import NumberedBatches, Order
from sycoca.finetune.smallcap import SmallCapDataConfig, SmallCapTable, SmallCapTask
from sycoca.generation import GenerationConfig
from sycoca.types import ConfigError, DataError
from tests.captioners import palette
from tests.captioners.palette import NUM_IMAGES, build_lm, build_palette, captions_of, colour_of, embed_images, pixels

GENERATION = GenerationConfig(method="beam", num_beams=3, num_return=3, max_tokens=6)


def build(folder: Path, *, num_items: int = 2, lm: CaptionLM | None = None, **changes) -> SmallCap:
    config = SmallCapConfig(
        lm=LMConfig(name=str(folder / "lm")), reduction=1, prompt=PromptConfig(num_items=num_items, max_tokens=40),
        generation=GENERATION, **changes,
    )  # fmt: skip
    return build_smallcap(build_palette(), lm or build_lm(), embed_images(folder), config)


def shake_adapters(captioner: SmallCap) -> SmallCap:
    palette.shake(captioner.adapters, std=0.3)
    return captioner


def table_of(captioner: SmallCap, folder: Path, **changes) -> SmallCapTable:
    return SmallCapTable(captioner, embed_images(folder), SmallCapDataConfig(**changes))


def states(keys: list[str]) -> torch.Tensor:
    """Patch states by key, without a file."""
    return build_palette().encode_patches(pixels([int(key.removeprefix("k")) for key in keys]))


def test_an_image_s_own_captions_are_never_retrieved_for_it_in_training(tmp_path: Path):
    captioner = build(tmp_path)
    table, careless = table_of(captioner, tmp_path), table_of(captioner, tmp_path, excludes_own=False)
    own = {key: set(captions_of(int(key.removeprefix("k")))) for key in table.image_keys}
    images = [table.image_keys[image] for image in table.image_of_text]
    assert len(table.keys) == 2 * NUM_IMAGES
    for index, key in enumerate(images):
        assert not own[key] & set(table.retrieved(index))
        assert all(colour_of(int(key.removeprefix("k"))) in text for text in table.retrieved(index)), "similar ones are found"
    assert any(own[key] & set(careless.retrieved(index)) for index, key in enumerate(images)), "the control does find them"
    [written] = captioner.explain(pixels([3]), ["k3"])
    assert not own["k3"] & set(written.retrieved) and len(written.retrieved) == 2


def test_a_prompt_s_captions_are_drawn_from_a_longer_list_anew_each_time(tmp_path: Path):
    table = table_of(build(tmp_path), tmp_path, pool=6)
    prompts = {tuple(table.collate(states, [0], [Random(seed)])["prompt"][0].tolist()) for seed in range(20)}
    assert len(table.retrieved(0)) == 6 and len(prompts) > 5


def test_a_batch_of_images_is_captioned_as_each_of_them_alone(tmp_path: Path):
    captioner = shake_adapters(build(tmp_path))
    numbers = [0, 1, 2, 5]
    keys = [f"k{number}" for number in numbers]
    together = captioner.explain(pixels(numbers), keys)
    alone = [captioner.explain(pixels([number]), [key])[0] for number, key in zip(numbers, keys)]
    for one, other in zip(together, alone, strict=True):
        assert (one.caption, one.retrieved, one.candidates) == (other.caption, other.retrieved, other.candidates)
        assert one.scores == pytest.approx(other.scores, abs=1e-4) and one.caption == one.candidates[0]
    assert len({written.caption for written in together}) > 1


def test_another_datastore_changes_what_is_retrieved_and_no_weight(tmp_path: Path):
    captioner = shake_adapters(build(tmp_path))
    before = hash_weights(captioner.lm, "")
    rows = [Row(f"a {colour} bicycle {number}", "") for colour in palette.COLOURS for number in range(3)]
    captioner.swap(rows_of_texts(rows, captioner.encoder))
    [written] = captioner.explain(pixels([0]), [""])
    assert all("red bicycle" in text for text in written.retrieved)
    assert hash_weights(captioner.lm, "") == before


def test_a_loaded_captioner_writes_the_same_and_refuses_another_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    palette.save_lm(tmp_path / "lm")
    captioner = build(tmp_path)
    shake_adapters(captioner).save(tmp_path / "captioner")
    monkeypatch.setattr("sycoca.captioners.captioner.load_encoder", lambda name, device: build_palette())
    loaded = SmallCap.load(tmp_path / "captioner", "cpu")
    keys = ["k1", "k2"]
    assert loaded.explain(pixels([1, 2]), keys) == captioner.explain(pixels([1, 2]), keys)
    other = load_lm(tmp_path / "lm")
    palette.shake(other.model)
    other.model.save_pretrained(tmp_path / "lm")  # pyright: ignore
    with pytest.raises(DataError, match=r"do not belong together. Fit the captioner again"):
        SmallCap.load(tmp_path / "captioner", "cpu")


def test_retrieval_through_an_aligner_is_a_choice(tmp_path: Path):
    captioner = build(tmp_path, space="aligned")
    found = captioner.retriever
    assert found.aligner.method == "procrustes" and found.datastore.transform.kinds == ["l2", "centre", "l2"]
    [written] = captioner.explain(pixels([4]), ["k4"])
    assert all("green" in text for text in written.retrieved)


def test_stored_patch_states_are_those_that_are_encoded_when_asked_for(tmp_path: Path):
    store, encoder, shards = embed_images(tmp_path), build_palette(), [str(tmp_path / "shards")]
    with pytest.raises(DataError, match="holds no patch states"):
        StoredPatches(store)
    reading = Reading(shards, "train", batch_size=4, num_workers=0)
    assert store_patches(encoder, store, reading) == 2 and store_patches(encoder, store, reading) == 0
    keys = [store.keys[row] for row in (7, 1, 7, 2)]
    assert len({colour_of(int(key.removeprefix("k"))) for key in keys}) == 3
    stored, encoded = StoredPatches(store)(keys), EncodedPatches(encoder, shards)(keys)
    torch.testing.assert_close(stored, encoded, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encoded, states(keys))
    with pytest.raises(DataError, match="no image of this name"):
        EncodedPatches(encoder, shards)(["k99"])


def test_only_the_caption_is_learnt_and_only_adapters_get_a_gradient(tmp_path: Path):
    captioner = shake_adapters(build(tmp_path))
    task = SmallCapTask(captioner, is_bf16=False).eval()
    table = table_of(captioner, tmp_path)
    batch = table.collate(states, [0, 5, 8], [Random(0)] * 3)
    loss, _ = task(batch)
    loss.backward()
    names = [*dict(task.named_parameters()), *task.state_dict()]
    assert {name.partition(".")[0] for name in names} == {"adapters"}
    assert all(parameter.grad is not None for parameter in task.parameters())
    assert all(parameter.grad is None for parameter in captioner.lm.model.parameters())
    longer = {**batch, "token": torch.nn.functional.pad(batch["token"], (0, 2), value=5)}
    torch.testing.assert_close(task(longer)[0], loss)
    prompt, memory = PromptBatch(batch["prompt"], batch["prompt_is_real"]), Condition(memory_NMF=batch["memory"])
    log_prob_NT = captioner.lm.log_probs(prompt, batch["token"], batch["length"], memory)
    torch.testing.assert_close(loss, -log_prob_NT.sum() / batch["length"].sum(), msg="a mean over the captions' tokens")


@pytest.mark.slow
def test_trained_adapters_read_the_patches_and_blank_ones_cost_the_score(tmp_path: Path):
    """Without retrieved captions nothing but the patches tells the colour."""
    captioner = build(tmp_path, num_items=0, lm=palette.build_taught_lm())
    table = table_of(captioner, tmp_path, batch_size=12)
    task = SmallCapTask(captioner, is_bf16=False).train()
    frozen = hash_weights(captioner.lm.model, "")
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in islice(NumberedBatches(table.keys, partial(table.collate, states), Order(0, 12, 0, 1), resume=None), 150):
        loss, _ = task(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    task.eval()
    image_BE, memory_BMF = build_palette().encode_image(pixels(range(12))), build_palette().encode_patches(pixels(range(12)))
    keys = [f"k{number}" for number in range(12)]
    references = {key: captions_of(number) for number, key in enumerate(keys)}

    def cider(memory: torch.Tensor) -> float:
        written = captioner.write(image_BE, memory, keys)
        return score_captions({k: w.caption for k, w in zip(keys, written)}, references).corpus["CIDEr"]

    seen, blank = cider(memory_BMF), cider(torch.zeros_like(memory_BMF))
    assert seen > 2 * blank and seen > 100
    assert hash_weights(captioner.lm.model, "") == frozen


def test_what_smallcap_cannot_be_is_refused(tmp_path: Path):
    tree = {"lm": {"name": "x"}, "prompt": {"order": "sample", "pool": 8}}
    with pytest.raises(ConfigError, match=r"to draw them in training set data.pool"):
        parse_config(SmallCapConfig, tree, source="tests")
    with pytest.raises(DataError, match=r"captioner.prompt asks for 99 captions of a datastore of 24"):
        build(tmp_path, num_items=99)
