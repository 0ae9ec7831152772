"""SmallCap and CgT-GAN from a configuration to a folder: what changes, what is logged, resume, and that no pair is read."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from pairs_data import forget_after, quiet_run, save_start, scenes  # noqa: F401  fixtures
from PIL import Image
from safetensors.torch import load_file

import sycoca
from sycoca.captioners.captioner import read_fit
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import hash_weights, load_encoder
from sycoca.captioners.lm_loading import load_lm
from sycoca.captioners.transform import fit_transform
from sycoca.config import dump_config, load_config, parse_config
from sycoca.finetune.captioner_fits import FITS
from sycoca.finetune.cgtgan import CgTGanFit, fit_cgtgan
from sycoca.finetune.corpus import Corpus, CorpusConfig
from sycoca.finetune.smallcap import SmallCapFit, fit_smallcap
from sycoca.types import ConfigError
from tests.captioners import palette
from tests.smoke.launching import DDP, run

ROOT = Path(__file__).parents[2]
TERMS = {"policy_loss", "discriminator_loss", "reward", "semantic", "natural", "rho", "baseline", "real_prob", "written_prob"}


@pytest.fixture(scope="module")
def parts(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A checkpoint of ours and a language model; the scenes are embedded by the first fit."""
    folder = tmp_path_factory.mktemp("parts")
    save_start(folder / "encoder", scenes)
    palette.save_lm(folder / "lm")
    return folder


def shared(parts: Path, scenes: Path, folder: Path) -> dict[str, Any]:  # noqa: F811
    """Four steps, saved and evaluated every two."""
    pairs = {"store": str(parts / "store"), "shards": [f"{scenes}/train-*.tar"], "held_out": "val",
             "held_out_shards": [f"{scenes}/val-*.tar"], "batch_size": 5, "num_workers": 0}  # fmt: skip
    return {
        "run": {"folder": str(folder), "precision": "fp32", "log_every": 1, "checkpoint_every": 2, "tensorboard": False},
        "optim": {"lr": 0.01, "num_steps": 4, "warmup_steps": 0},
        "encoder": str(parts / "encoder"),
        "pairs": pairs,
        "evaluate": {"every": 2, "batch_size": 3, "limit": 4},
    }


def smallcap(parts: Path, scenes: Path, folder: Path) -> SmallCapFit:  # noqa: F811
    captioner = {"type": "smallcap", "lm": {"name": str(parts / "lm")}, "reduction": 2,
                 "prompt": {"num_items": 2, "max_tokens": 40}, "generation": {"max_tokens": 6}}  # fmt: skip
    data = {"batch_size": 3, "max_tokens": 12, "pool": 4}
    tree = {**shared(parts, scenes, folder), "captioner": captioner, "data": data}
    tree["evaluate"]["blank_patches"] = True
    return parse_config(SmallCapFit, tree, source="tests")


def cgtgan(parts: Path, scenes: Path, folder: Path, **changes: Any) -> CgTGanFit:  # noqa: F811
    tree = {
        **shared(parts, scenes, folder),
        "captioner": {"type": "cgtgan", "lm": {"name": str(parts / "lm")}, "num_prefix": 2, "generation": {"max_tokens": 6},
                      "transform": ["l2", "zscore"]},
        "initialise": {"optim": {"lr": 0.01, "num_steps": 2, "warmup_steps": 0}, "batch_size": 4},
        "discriminator": {"small": {"width": 8, "num_layers": 1, "num_heads": 2}, "hidden": 6},
        "reward": {"num_natural_steps": 1, "full_step": 3},
        "policy": {"num_samples": 2, "max_tokens": 6},
        "batch_size": 3,
    }
    return parse_config(CgTGanFit, {**tree, **changes}, source="tests")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints/last/model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_resumes(fit: Callable[[], Any], folder: Path) -> Any:
    """Killed after step 2, it ends with the same weights, to the bit; gives what the second launch says."""
    whole = weights_of(folder)
    forget_after(folder, step=2)
    again = fit()
    assert_same(weights_of(folder), whole)
    return again


@pytest.mark.slow
def test_smallcap_trains_nothing_but_its_adapters_and_goes_on_where_it_stopped(
    parts: Path, scenes: Path, tmp_path: Path, quiet_run: None  # noqa: F811
):
    config = smallcap(parts, scenes, tmp_path / "run")
    frozen = hash_weights(load_lm(parts / "lm").model, ""), load_encoder(config.encoder).fingerprint
    result = fit_smallcap(config)
    assert result["step"] == 4 and 0 < result["fit_seconds"] < 600 and "CIDEr" in result
    assert 0 <= float(result["copied_share"]) <= 1 and result["blank/num_images"] == result["num_images"]
    first = load_file(tmp_path / "run/checkpoints/step_00000002/model.safetensors")
    last = weights_of(tmp_path / "run")
    assert {name.partition(".")[0] for name in last} == {"adapters"}
    assert sum(value.numel() for value in last.values()) == result["num_trained"] == read_fit(tmp_path / "run")["num_trained"]
    assert all(not torch.equal(last[name], first[name]) for name in last)
    captioner = sycoca.load_captioner(tmp_path / "run")
    lm_hash = hash_weights(captioner.light.lm.model, "")  # pyright: ignore
    assert (lm_hash, captioner.light.encoder.fingerprint) == frozen
    [written] = captioner.explain([Image.new("RGB", (40, 30), (200, 10, 10))])
    assert written.caption in written.candidates and len(written.retrieved) == 2
    assert_resumes(lambda: fit_smallcap(config), tmp_path / "run")


@pytest.mark.slow
def test_cgtgan_logs_every_reward_reports_both_choices_and_goes_on_where_it_stopped(
    parts: Path, scenes: Path, tmp_path: Path, quiet_run: None  # noqa: F811
):
    config = cgtgan(parts, scenes, tmp_path / "run")
    result = fit_cgtgan(config)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(line.keys() >= TERMS for line in lines if "loss" in line)
    assert [line["rho"] for line in lines if "loss" in line] == [0, 0.25, 0.5, 0.5]
    evaluations = {line["step"]: line for line in lines if "eval/CIDEr" in line}
    assert evaluations.keys() == {2, 4} and result["initialised"].keys() >= {"CIDEr", "unpaired"}
    for criterion, figure in (("paired", "CIDEr"), ("unpaired", "unpaired")):
        chosen = result["selected"][criterion]
        assert chosen[figure] == max(line[f"eval/{figure}"] for line in evaluations.values()) and chosen["step"] in (2, 4)
    captioner = sycoca.load_captioner(tmp_path / "run")
    [written] = captioner.explain([Image.new("RGB", (40, 30), (200, 10, 10))])
    assert written.caption == written.candidates[0] and written.retrieved == []
    store = EmbeddingStore(parts / "store", "train")
    fitted = fit_transform(["l2", "zscore"], lambda: (block.image_NE for block in store.blocks()))
    assert captioner.light.image_transform.fingerprint == fitted.fingerprint  # pyright: ignore
    before = load_lm(parts / "lm").model.state_dict()
    after = captioner.light.generator.lm.model.state_dict()  # pyright: ignore
    names = ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight")
    assert all(not torch.equal(before[name], after[name]) for name in names), "the language model is trained too"
    again = assert_resumes(lambda: fit_cgtgan(config), tmp_path / "run")
    assert again["initialised"] == result["initialised"] and again["selected"] == result["selected"], "it was measured before"


@pytest.mark.slow
def test_which_image_a_sentence_was_written_for_changes_no_bit_of_cgtgan(
    parts: Path, scenes: Path, tmp_path: Path, quiet_run: None, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):
    changes = {"evaluate": {"every": 0}, "initialise": {"optim": {"lr": 0.01, "num_steps": 1, "warmup_steps": 0}}}
    for name in ("paired", "permuted"):
        fit_cgtgan(cgtgan(parts, scenes, tmp_path / name, **changes))
        read = CorpusConfig.read

        def read_permuted(self: CorpusConfig, *args: Any, read: Any = read):
            contents = read(self, *args)
            sources = [row.source for row in contents.rows]
            Random(5).shuffle(sources)
            assert sources != [row.source for row in contents.rows]
            contents.rows[:] = [row._replace(source=source) for row, source in zip(contents.rows, sources, strict=True)]
            return contents

        monkeypatch.setattr(CorpusConfig, "read", read_permuted)
    assert_same(weights_of(tmp_path / "paired"), weights_of(tmp_path / "permuted"))


@pytest.mark.slow
def test_two_processes_train_both_players_and_each_reads_its_own_images(parts: Path, scenes: Path, tmp_path: Path):  # noqa: F811
    """Through the tool: both stages of one launch, each under DDP, and a folder that is loaded again."""
    config = cgtgan(parts, scenes, tmp_path / "run", evaluate={"every": 2, "limit": 4})
    (tmp_path / "two.yaml").write_text(dump_config(config), encoding="utf-8")
    done = run([*DDP, "tools/captioner.py", "fit", str(tmp_path / "two.yaml")], tmp_path, is_ddp=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine DDP, 2 processes" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["step"] == 4 and result["selected"]["unpaired"]["num_images"] == 4
    states = [json.loads((tmp_path / f"run/checkpoints/last/state/rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert [state["workers"]["0"]["offset"] for state in states] == [6, 6], "two epochs of six images on each"
    assert sycoca.load_captioner(tmp_path / "run").caption([Image.new("RGB", (40, 30))])


def test_sentences_are_drawn_without_regard_to_the_image(tmp_path: Path):
    """As many of its own as chance gives; with one order for both, all of them would be."""
    store = palette.embed_images(tmp_path)
    contents = CorpusConfig().read(palette.build_palette(), store)
    transform = fit_transform(["zscore"], lambda: [torch.from_numpy(contents.embedding_SE)])
    corpus = Corpus(contents, palette.build_lm(), max_tokens=12, transform=transform)
    assert len(corpus) == 2 * len(store)
    own = 0
    for epoch in range(100):
        generators = [Random(f"0/{epoch}/{key}") for key in store.keys]
        batch = corpus.collate_beside(store, transform, range(len(store)), generators)
        own += sum(text in palette.captions_of(int(key[1:])) for text, key in zip(batch["text"], batch["key"]))
    assert 60 < own < 140, "of 1,200 draws, one in twelve"
    image_NE = store.image_rows(range(len(store)))
    assert torch.equal(batch["image"], image_NE), "what rewards read"
    assert torch.equal(batch["embedding"], transform(image_NE))
    of_text_SE = corpus.collate(range(len(corpus)), [])["embedding"]
    torch.testing.assert_close(of_text_SE.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(of_text_SE.std(0, correction=0), torch.ones(3))


def test_a_corpus_may_be_a_file_of_sentences(tmp_path: Path):
    (tmp_path / "texts.txt").write_text("a red dog\n\nthe thing is blue\n", encoding="utf-8")
    store, encoder = palette.embed_images(tmp_path), palette.build_palette()
    rows = CorpusConfig(texts=str(tmp_path / "texts.txt")).read(encoder, store)
    assert [row.text for row in rows.rows] == ["a red dog", "the thing is blue"]
    torch.testing.assert_close(torch.from_numpy(rows.embedding_SE), encoder.encode_text(["a red dog", "the thing is blue"]))
    with pytest.raises(ConfigError, match="expected one source of sentences"):
        parse_config(CorpusConfig, {"texts": "a", "store": "b"}, source="tests")


CONFIGS = [path for kind in ("smallcap", "cgtgan") for path in sorted((ROOT / "configs/captioner").glob(f"{kind}_*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_captioner_that_is_trained_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")
    config = load_config(FITS[path.stem.partition("_")[0]].schema, path)
    assert isinstance(config, SmallCapFit | CgTGanFit) and config.run.folder == f"runs/{path.stem}"
    header = " ".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert f"tools/captioner.py fit configs/captioner/{path.name}" in header and "Hardware:" in header


def test_the_three_tasks_of_cgtgan_are_choices_of_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA", "/data")
    names = ("flickr8k", "flickr8k_zs", "flickr8k_cross")
    own, zero_shot, cross = (load_config(CgTGanFit, ROOT / f"configs/captioner/cgtgan_{name}.yaml") for name in names)
    assert own.corpus.texts is own.corpus.store is None
    assert zero_shot.corpus.texts is not None and cross.corpus.store not in (None, cross.pairs.store)


def test_what_smallcap_cannot_be_trained_with_is_refused(parts: Path, scenes: Path, tmp_path: Path, quiet_run: None):  # noqa: F811
    config = smallcap(parts, scenes, tmp_path)
    for changes, message in (
        ({"data": config.data.model_copy(update={"pool": 1})}, "data.pool is 1, fewer than captioner.prompt.num_items"),
        ({"optim": config.optim.model_copy(update={"num_chunks": 3})}, "optim.num_chunks"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_smallcap(config.model_copy(update=changes))
