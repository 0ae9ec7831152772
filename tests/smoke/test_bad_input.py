"""What a user gets wrong is answered with one clear line and a status that is not 0, never with a traceback."""

import tarfile
from pathlib import Path

import pytest

from tests.smoke.launching import PLAIN, SMOKE, pretrain, run

pytestmark = pytest.mark.slow


def error_of(data: Path, folder: Path, *overrides: str, config: str = SMOKE) -> str:
    """The one line of standard error that begins with `error:`."""
    done = run([*PLAIN, "tools/pretrain.py", config, f"run.folder={folder}", *overrides], data)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "{" not in done.stdout  # no result; libraries may say something
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.stderr.splitlines()[-1] == line
    return line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.learning_rate=1"], "optim.learning_rate: unknown key"),
        (["data.batch_size=many"], "data.batch_size: Input should be a valid integer"),
        (["objectives.ic.drop_shar=0"], "objectives.ic.drop_shar: unknown key, did you mean 'drop_share'?"),
        (["optim.lr"], "expected key.sub=value"),
        (["data.shards=[gone/train-0.tar]"], "gone/train-0.tar: no such shard or folder"),
        (["evaluate.shards=[gone]"], "gone: no such shard or folder"),
        (["data.tokenizer.name=gone"], "tokenizer gone: expected `clip`"),
        (["data.transform.size=64"], "data.transform.size is 64 and model.vision.image_size is 32"),
        (["optim.num_chunks=3"], "optim.num_chunks: a batch of 4 does not divide into 3 chunks"),
        (["run.resume=gone"], "run.resume: no checkpoint at gone"),
        (["init.checkpoint=gone"], "no checkpoint at gone"),
        (["model.vision.name=vit_of_dreams"], "timm cannot build 'vit_of_dreams'"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else None,
)
def test_a_wrong_setting_is_one_line(overrides: list[str], expected: str, data: Path, tmp_path: Path):
    assert expected in error_of(data, tmp_path, *overrides)


def test_a_missing_configuration_is_one_line(data: Path, tmp_path: Path):
    assert "no configuration file at gone.yaml" in error_of(data, tmp_path, config="gone.yaml")


def test_a_checkpoint_of_another_shape_is_one_line(data: Path, tmp_path: Path):
    short = ("optim.num_steps=1", "run.sample_every=0", "evaluate.every=0")
    pretrain(PLAIN, data, tmp_path, *short)
    assert "has shape" in error_of(data, tmp_path / "other", "model.embed_width=20", f"init.checkpoint={tmp_path}", *short)
    assert "has shape" in error_of(data, tmp_path, "model.embed_width=20", *short)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_fails_inside_a_loader_process_is_one_line(num_workers: int, data: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(120):
            for extension in ("jpg", "txt"):
                tar.addfile(tarfile.TarInfo(f"{number}.{extension}"))
    line = error_of(data, tmp_path, f"data.shards=[{tmp_path / 'bad.tar'}]", f"data.num_workers={num_workers}")
    assert "samples could not be used, more than data.max_bad_share" in line
    assert str(tmp_path / "bad.tar") in line
