"""The tool from shards to captions and scores, with real encoders and language models, and what it says of bad input."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from encoders import save_own
from PIL import Image
from tiny_lms import build_lm, build_tokenizer

from sycoca.captioners.captioner import read_captioner
from sycoca.captioners.datastore_files import load_datastore
from sycoca.data.scenes import write_scenes
from tests.smoke.launching import ROOT

pytestmark = pytest.mark.slow
NUM_TRAIN, NUM_VAL, CAPTIONS_AN_IMAGE = 24, 6, 5
TOOL = "tools/captioner.py"
PROMPT = ["captioner.prompt.max_tokens=34", "captioner.prompt.num_items=2"]
SMALL = ["captioner.generation.max_tokens=4", "pairs.num_workers=0", *PROMPT]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`own` and `other`, checkpoints; `scenes`, shards; `lm`, a language model."""
    folder = tmp_path_factory.mktemp("captioner")
    save_own(folder / "own")
    save_own(folder / "other", seed=3)
    write_scenes(folder / "scenes", num_train=NUM_TRAIN, num_val=NUM_VAL, size=32, samples_per_shard=20)
    save_lm(folder / "lm")
    return folder


def save_lm(folder: Path, kind: str = "gpt2", **changes: Any) -> None:
    lm: Any = build_lm(kind)
    lm.model.save_pretrained(folder)
    build_tokenizer(**changes).save_pretrained(str(folder))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: Path):
    """Run the tool in this process; what its last line says, or with `fails` the error it ends with."""

    def run_here(*command: object, fails: bool = False) -> Any:
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, command)])
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DATA", str(made))
        capsys.readouterr()
        if fails:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / TOOL), run_name="__main__")
            assert ended.value.code == 2
            return capsys.readouterr().err.splitlines()[-1]
        runpy.run_path(str(ROOT / TOOL), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_here


def fit(made: Path, name: str, folder: Path, *overrides: str) -> list[str]:
    settings = [f"folder={folder}", f"encoder={made / 'own'}", f"captioner.lm.name={made / 'lm'}"]
    return ["fit", f"configs/captioner/{name}.yaml", *settings, *SMALL, *overrides]


def test_both_are_fitted_asked_and_measured(call, made: Path, tmp_path: Path):
    loop = ["augmentation.num_images=6", "augmentation.max_rounds=1", "augmentation.num_judged=3", "augmentation.metric=CLIP-S"]
    said = call(*fit(made, "recap_augmented_scenes", tmp_path / "recap", *loop))
    assert said["fit_seconds"] >= said["map_seconds"] > 0 and said["num_pairs"] >= NUM_TRAIN * CAPTIONS_AN_IMAGE
    assert [json.loads(line)["step"] for line in (tmp_path / "recap" / "augmentation.jsonl").read_text().splitlines()] == [0, 1]
    said = call(*fit(made, "sitta_aclip_scenes", tmp_path / "sitta", "captioner.num_prompts=3"))
    assert said["token_ndcg"].keys() == {"external", "lexical", "shuffled", "random"}

    aligner = tmp_path / "recap" / "aligner.safetensors"
    shards = ["--shards", made / "scenes" / "val-*.tar", "--workers", "0", "--aligner", aligner]
    names = {"BLEU-4", "ROUGE-L", "CIDEr", "CLIP-S", "RefCLIP-S", "aCLIP-S", "RefaCLIP-S", "captions_per_second", "num_images"}
    scores = {}
    for kind in ("recap", "sitta"):
        scores[kind] = call("evaluate", tmp_path / kind, *shards, "--out", tmp_path / f"{kind}.json")
        assert names | {"fit_seconds"} <= scores[kind].keys() and scores[kind]["num_images"] == NUM_VAL
        assert scores[kind]["captioner"] == kind and scores[kind]["captions_per_second"] > 0
    again = call("evaluate", tmp_path / "sitta.json", *shards, "--encoder", made / "own")
    assert {name: again[name] for name in ("CIDEr", "aCLIP-S", "CLIP-S")} == pytest.approx(
        {name: scores["sitta"][name] for name in ("CIDEr", "aCLIP-S", "CLIP-S")}, abs=1e-4
    )
    assert call("evaluate", made / "own", *shards)["captioner"] == "checkpoint"

    photo = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(photo)
    explained = call("caption", tmp_path / "sitta", photo, "--explain")["captions"][str(photo)]
    assert explained.keys() == {"caption", "retrieved", "candidates", "scores"} and len(explained["candidates"]) == 3
    assert call("caption", tmp_path / "sitta", photo)["captions"] == {str(photo): explained["caption"]}


def test_bad_input_ends_in_one_clear_line(call, made: Path, tmp_path: Path):
    call(*fit(made, "recap_scenes", tmp_path / "good"))
    num_rows = len(load_datastore(tmp_path / "good" / "datastore"))
    fails = [
        ([f"encoder={made / 'other'}"], "they do not belong together"),
        ([f"captioner.prompt.num_items={num_rows + 1}"], f"of a datastore of {num_rows}"),
        (["pairs.split=nothing", "pairs.shards=[]"], "no images of the split 'nothing'"),
        (["captioner.type=oracle"], "expected one of"),
        (["captioner.spaces=raw"], "did you mean 'space'"),
    ]
    for overrides, message in fails:
        assert message in call(*fit(made, "recap_scenes", tmp_path / "bad", *overrides), fails=True)
    few = call(*fit(made, "sitta_scenes", tmp_path / "bad", "captioner.prompt.num_items=500"), fails=True)
    assert "500 words asked" in few
    save_lm(tmp_path / "t5", "t5", pad_token=None)
    unpadded = fit(made, "recap_scenes", tmp_path / "bad", f"captioner.lm.name={tmp_path / 't5'}")
    assert "no pad token" in call(*unpadded, fails=True)

    call(*fit(made, "recap_scenes", tmp_path / "far", f"encoder={made / 'other'}", f"pairs.store={tmp_path / 'store'}"))
    photo, shards = tmp_path / "good.png", ["--shards", made / "scenes" / "val-*.tar", "--workers", "0"]
    parts = {"datastore": "datastore was built with", "aligner.safetensors": "encoder and aligner do not belong"}
    for part, message in parts.items():
        mixed = shutil.copytree(tmp_path / "good", tmp_path / f"mixed_{part}")
        if part == "datastore":
            shutil.rmtree(mixed / part)
            shutil.copytree(tmp_path / "far" / part, mixed / part)
        else:
            shutil.copy(tmp_path / "far" / part, mixed / part)
        assert message in call("caption", mixed, photo, fails=True)
    strange = ["--aligner", tmp_path / "far" / "aligner.safetensors"]
    assert "encoder and aligner do not belong" in call("evaluate", tmp_path / "good", *shards, *strange, fails=True)
    assert "expected --shards" in call("evaluate", tmp_path / "good", fails=True)
    assert "no checkpoint at" in call("evaluate", tmp_path / "nowhere", *shards, fails=True)
    assert read_captioner(tmp_path / "good")["captioner"] == "recap"
