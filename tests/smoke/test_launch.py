"""Every way to launch trains, evaluates, draws, saves, and goes on exactly where it was interrupted."""

import json
import shutil
import subprocess
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from PIL import Image

import sycoca
from sycoca.train.checkpoint.consolidate import consolidate
from tests.forks import free_port
from tests.smoke.launching import DDP, PLAIN, ROOT, SMOKE, accelerate, environment, losses, nodes, pretrain, run, zero_3

pytestmark = pytest.mark.slow

PLAINLY = ["plain", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
OFFLOADED = ["ZeRO-2 with offload", "ZeRO-3 with offload"]
SOAKED = [pytest.param(engine, marks=pytest.mark.soak) for engine in OFFLOADED]
ENGINES = [*PLAINLY, "FSDP2", *SOAKED]


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The command of each engine."""
    files = {"ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-2 with offload": "zero2_offload", "FSDP2": "fsdp2"}
    launched = {engine: accelerate(f"launch/accelerate/{name}.yaml") for engine, name in files.items()}
    folder = tmp_path_factory.mktemp("launch")
    zero = {"ZeRO-3": zero_3(folder), "ZeRO-3 with offload": zero_3(folder, "zero3_offload")}
    return {"plain": PLAIN, "DDP": DDP, **launched, **zero}


@pytest.fixture(scope="module")
def runs(launchers, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run under an engine: its folder and what it printed. Each is made once."""
    made = {}

    def make(engine: str):
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine)
            made[engine] = (folder, pretrain(launchers[engine], data, folder))
        return made[engine]

    return make


@pytest.mark.parametrize("engine", ENGINES)
def test_a_launch_says_what_it_is_and_leaves_figures_samples_and_a_checkpoint_that_loads(engine: str, runs):
    folder, done = runs(engine)
    num = 1 if engine == "plain" else 2
    ours = [line for line in done.stderr.splitlines() if line[2:3] == ":" and line[5:6] == ":"]
    assert f"engine {engine}, {num} process{'es' if num > 1 else ''} on cpu, fp32, batch 4 x {num} = {4 * num}" in ours[0]

    [printed] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(printed)
    assert result["step"] == 6
    assert result["num_images"] == 25
    assert {path.name for path in (folder / "samples").iterdir()} >= {"step_00000003.png", "step_00000006.json"}

    subject = sycoca.load(folder)
    assert subject.encode_text(["a red circle"]).isfinite().all()
    assert subject.encode_image([Image.new("RGB", (40, 30))]).isfinite().all()


@pytest.mark.parametrize("engine", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", *SOAKED])
def test_every_engine_gives_the_losses_and_weights_of_ddp(engine: str, runs):
    """Also shows that clipping and batch size reach DeepSpeed: the gradient is clipped in every step."""
    expected, found = losses(runs("DDP")[0]), losses(runs(engine)[0])
    assert all(values["grad_norm"] > 1 for _, values in expected)
    for (step, values), (same_step, others) in zip(expected, found, strict=True):
        assert step == same_step
        assert others == pytest.approx(values, rel=1e-4)
    weights, others = (sycoca.load(runs(name)[0] / "checkpoints/last").model.state_dict() for name in ("DDP", engine))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)


LAUNCHED_IN_SOAKS = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", *OFFLOADED]
"""DDP and ZeRO-2 are killed and resumed in tests/distributed/ in every run of the tests."""


@pytest.mark.parametrize(
    "engine", ["plain", *(pytest.param(engine, marks=pytest.mark.soak) for engine in LAUNCHED_IN_SOAKS)]
)
def test_an_interrupted_run_goes_on_with_bit_identical_losses(engine: str, runs, launchers, data: Path, tmp_path: Path):
    """Six steps, against six of which those after the checkpoint at step 3 are lost and run again."""
    whole = dict(losses(runs(engine)[0]))
    pretrain(launchers[engine], data, tmp_path, "run.checkpoint_every=4", "evaluate.every=4", "run.sample_every=0")
    _forget_after(tmp_path, step=4)
    done = pretrain(launchers[engine], data, tmp_path, "run.checkpoint_every=4", "evaluate.every=4")
    assert "at step 4" in done.stderr
    written = losses(tmp_path)
    assert [step for step, _ in written] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert [values for _, values in written] == [whole[step] for step, _ in written]


@pytest.mark.parametrize("engine", ["FSDP2", pytest.param("DDP", marks=pytest.mark.soak)])
def test_a_checkpoint_of_fsdp2_is_continued(engine: str, runs, launchers, data: Path, tmp_path: Path):
    """Bit for bit by itself; by DDP to what the order of sums allows, since the optimiser's state is saved whole."""
    whole = dict(losses(runs("FSDP2")[0]))
    shutil.copytree(runs("FSDP2")[0], tmp_path / "run", symlinks=True)
    _forget_after(tmp_path / "run", step=3)
    done = pretrain(launchers[engine], data, tmp_path / "run", "run.sample_every=0")
    assert "at step 3" in done.stderr
    written = losses(tmp_path / "run")[6:]
    assert [step for step, _ in written] == [4, 5, 6]
    tolerance = 0.0 if engine == "FSDP2" else 1e-4
    for step, values in written:
        assert values == pytest.approx(whole[step], rel=tolerance, abs=0)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["one_process", "ddp"])
def test_plain_launch_files_run_without_a_gpu(name: str, data: Path, tmp_path: Path):
    launcher = accelerate(f"launch/accelerate/{name}.yaml")
    launcher = launcher if name == "ddp" else [*launcher, "--num_processes", "1"]
    done = pretrain(launcher, data, tmp_path, "optim.num_steps=1", "run.sample_every=0", "evaluate.every=0")
    assert f"engine {'DDP, 2 processes' if name == 'ddp' else 'plain, 1 process'} on cpu" in done.stderr


@pytest.mark.soak
@pytest.mark.parametrize(("name", "engine"), [("ddp", "DDP"), ("zero2", "ZeRO-2"), ("fsdp2", "FSDP2")])
def test_two_nodes_train_as_one_run_of_two_processes(name: str, engine: str, runs, data: Path, tmp_path: Path):
    """Two launchers on this machine, which meet over loopback."""
    arguments = [SMOKE, f"run.folder={tmp_path}"]
    started = [
        subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(data) | own, stdout=PIPE, stderr=PIPE, text=True)
        for command, own in nodes(f"launch/accelerate/{name}.yaml", free_port())
    ]
    (result, log), (nothing, quiet) = (process.communicate(timeout=900) for process in started)
    assert all(process.returncode == 0 for process in started), log + quiet
    assert f"engine {engine}, 2 processes on cpu" in log
    assert "{" in result and "{" not in nothing, "the first node alone reports"
    for (step, values), (same_step, others) in zip(losses(runs("DDP")[0]), losses(tmp_path), strict=True):
        assert step == same_step
        assert others == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_resuming_is_exact_with_random_masks_dropout_and_loader_processes(num_workers: int, data: Path, tmp_path: Path):
    overrides = [
        f"data.num_workers={num_workers}", "objectives.tg_mim.mask=random", "model.text.dropout=0.1", "evaluate.every=0",
        "run.sample_every=0",
    ]  # fmt: skip
    pretrain(PLAIN, data, tmp_path / "whole", *overrides)
    pretrain(PLAIN, data, tmp_path / "resumed", *overrides)
    _forget_after(tmp_path / "resumed", step=3)
    pretrain(PLAIN, data, tmp_path / "resumed", *overrides)
    whole = dict(losses(tmp_path / "whole"))
    assert [step for step, _ in losses(tmp_path / "resumed")] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert all(values == whole[step] for step, values in losses(tmp_path / "resumed"))


@pytest.mark.soak
def test_zero_3_keeps_frozen_weights(launchers, data: Path, tmp_path: Path):
    pretrain(
        launchers["ZeRO-3"], data, tmp_path, "model.locked=[vision]", "optim.num_steps=1", "run.sample_every=0",
        "evaluate.every=0",
    )  # fmt: skip
    assert sycoca.load(tmp_path).encode_image([Image.new("RGB", (32, 32))]).isfinite().all()


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-3"])
def test_chunks_change_no_loss(engine: str, runs, launchers, data: Path, tmp_path: Path):
    overrides = ("run.sample_every=0", "optim.num_steps=3", "optim.num_chunks=2")
    pretrain(launchers[engine], data, tmp_path, *overrides)
    first, same = losses(runs(engine)[0])[0][1], losses(tmp_path)[0][1]
    assert same == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_checkpoint_of_any_engine_becomes_one_proven_file(engine: str, runs, tmp_path: Path):
    found = consolidate(runs(engine)[0] / "checkpoints/last", tmp_path / "out.safetensors", choice="newest")
    assert found["is_forward_equal"]
    assert found["are_shards_equal"] == engine.startswith("ZeRO")


def test_the_state_of_another_engine_is_refused(runs, data: Path):
    folder, _ = runs("ZeRO-2")
    command = [*PLAIN, "tools/pretrain.py", "configs/pretrain/smoke.yaml", f"run.folder={folder}", "optim.num_steps=7"]
    done = run(command, data)
    assert done.returncode == 2
    assert "written by ZeRO-2 on 2 processes and this run is plain on 1" in done.stderr.splitlines()[-1]


def _forget_after(folder: Path, *, step: int) -> None:
    """Leave the run as if it had been killed before its next checkpoint after `step`."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.glob("step_*"):
        if path.name > f"step_{step:08d}":
            path.rename(path.with_name(f"lost_{path.name}"))
    for link in (checkpoints / "last", checkpoints / "best"):
        link.unlink(missing_ok=True)
    (checkpoints / "last").symlink_to(f"step_{step:08d}")
