"""The tools from shards to an aligner and a datastore; embedding also by two real processes."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import TEXTS, save_own

from sycoca.captioners.datastore_files import load_datastore
from sycoca.captioners.linear_aligner import load_aligner
from sycoca.data.scenes import write_scenes
from tests.smoke.launching import DDP, ROOT, run

pytestmark = pytest.mark.slow
NUM_TRAIN, NUM_VAL, CAPTIONS_AN_IMAGE = 50, 12, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`own`, a checkpoint; `scenes`, shards; `store`, their embeddings: the training split's by two processes."""
    folder = tmp_path_factory.mktemp("parts")
    save_own(folder / "own")
    write_scenes(folder / "scenes", num_train=NUM_TRAIN, num_val=NUM_VAL, size=32, samples_per_shard=20)
    done = run([*DDP, *embed_command(folder, "train", folder / "store")], folder, is_ddp=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["num_images"], said["num_captions"], said["num_embedded"]) == (NUM_TRAIN, NUM_TRAIN * CAPTIONS_AN_IMAGE, 3)
    return folder


def embed_command(folder: Path, split: str, store: Path) -> list[str]:
    shards = str(folder / "scenes" / f"{split}-*.tar")
    return ["tools/embed.py", str(folder / "own"), "--shards", shards, "--split", split, "--out", str(store), "--workers", "0"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a tool in this process; what its last line says, or with `fails` the error it ends with."""

    def run_here(*command: object, fails: bool = False) -> Any:
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        if fails:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            assert ended.value.code == 2
            return capsys.readouterr().err.splitlines()[-1]
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_here


def test_one_process_embeds_what_two_do_and_goes_on_with_their_store(call, made: Path, tmp_path: Path):
    assert call(*embed_command(made, "train", tmp_path / "store"))["num_embedded"] == 3
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.npy"))
    assert len(files) == 9
    for path in files:
        np.testing.assert_allclose(np.load(tmp_path / path), np.load(made / path), atol=1e-6)
    assert call(*embed_command(made, "train", made / "store"))["num_kept"] == 3


def test_from_embeddings_to_an_aligner_and_a_datastore_that_is_built_with_it(call, made: Path, tmp_path: Path):
    store, aligner, datastore = made / "store", tmp_path / "aligner.safetensors", tmp_path / "datastore"
    held_out = ["--held-out-shards", made / "scenes" / "val-*.tar", "--encoder", made / "own"]
    said = call("tools/fit_aligner.py", store, "--out", aligner, *held_out)
    assert said["num_pairs"] == NUM_TRAIN * CAPTIONS_AN_IMAGE
    for name in ("raw", "centred", "aligned", "shuffled"):
        assert said[name]["num_images"] == NUM_VAL
        assert {f"{way}/R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= said[name].keys()
    tool = "tools/build_datastore.py"
    built = call(tool, "build", datastore, "--embeddings", store, "--aligner", aligner, "--index", "IVF8,Flat")
    assert (built["num_rows"], built["transform"]) == (NUM_TRAIN * CAPTIONS_AN_IMAGE, ["l2", "centre", "l2"])
    load_datastore(datastore).check_aligner(load_aligner(aligner))
    assert "the split val" in call(tool, "add", datastore, "--embeddings", store, "--split", "val", fails=True)

    texts = tmp_path / "texts.jsonl"
    rows = [{"text": text, "origin": "synthetic", "score": score} for text, score in zip(TEXTS, (0.1, 0.5, 0.9), strict=True)]
    texts.write_text("\n".join(json.dumps(row) for row in rows))
    added = call(tool, "add", datastore, "--texts", texts, "--encoder", made / "own")
    assert added["origins"] == {"human": NUM_TRAIN * CAPTIONS_AN_IMAGE, "synthetic": 3}
    swapped = call(tool, "swap", datastore, "--texts", texts, "--encoder", made / "own", fails=True)
    assert "cannot be trained on 3 rows" in swapped
    kept = call(tool, "filter", datastore, "--origin", "human")
    assert call(tool, "inspect", datastore) == kept and kept["num_rows"] == NUM_TRAIN * CAPTIONS_AN_IMAGE


def test_what_the_options_leave_out_is_said(call, made: Path, tmp_path: Path):
    tool, datastore = "tools/build_datastore.py", tmp_path / "datastore"
    assert "one of the two" in call(tool, "build", datastore, fails=True)
    assert "--encoder" in call(tool, "build", datastore, "--texts", made / "none.txt", fails=True)
    assert "no datastore there" in call(tool, "inspect", datastore, fails=True)
    asked = ["--out", tmp_path / "aligner", "--held-out", "nothing"]
    assert "split 'nothing'; there is" in call("tools/fit_aligner.py", made / "store", *asked, fails=True)
