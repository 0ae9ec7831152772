"""Every launcher brings a signal to the training processes, and what they saved is whole."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sycoca.data.scenes import write_scenes
from sycoca.train.checkpoint.checksums import list_damage
from sycoca.train.checkpoint.stop import STOPPED_STATUS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMOKE = "configs/pretrain/smoke.yaml"
TIMEOUT = 500

SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> "$(dirname "$0")/requeued" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 "$@" &
child=$!
trap 'interrupted=true; kill -USR1 "$child"' USR1
interrupted=true
while $interrupted; do
  interrupted=false
  status=0
  wait "$child" || status=$?
done
exit "$status"
"""
"""Stand-ins for SLURM's commands on one node: srun passes signals on and ends with the task's status, as the real one does."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "scenes32", num_train=20, num_val=2, size=32, samples_per_shard=10)
    return folder


def stop(command: list[str], number: signal.Signals, data: Path, folder: Path, **variables: str) -> int:
    """Launch a run that would go on for very long, signal the launcher after the first steps, and give its status."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched and not name.startswith("ACCELERATE")}
    env |= {"DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    settings = [f"run.folder={folder}", "optim.num_steps=1000000", "run.checkpoint_every=0", "run.sample_every=0"]
    with (folder.parent / "said").open("w+") as said:
        process = subprocess.Popen(
            [*command, SMOKE, *settings, "evaluate.shards=[]"], cwd=ROOT, env=env, stdout=said, stderr=said
        )
        try:
            wait_for_steps(folder / "log.jsonl", process)
            process.send_signal(number)
            return process.wait(timeout=TIMEOUT)
        except (AssertionError, subprocess.TimeoutExpired):
            said.seek(0)
            pytest.fail(said.read()[-3000:])
        finally:
            process.kill()


def wait_for_steps(log: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(TIMEOUT * 10):
        if log.is_file() and log.read_text().count("\n") >= 2:
            return
        assert process.poll() is None, "ended by itself"
        time.sleep(0.1)
    raise AssertionError("no step in time")


def check_saved(folder: Path, *, engine: str) -> None:
    last = folder / "checkpoints/last"
    assert list_damage(last) == []
    assert json.loads((last / "meta.json").read_text())["engine"] == engine


@pytest.mark.slow
def test_a_slurm_job_that_is_signalled_saves_and_requeues_itself(data: Path, tmp_path: Path):
    """The whole way: batch script, srun, multi_node.sh, forward_signals.py, two ranks under ZeRO-2."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    command = ["bash", "launch/slurm.sh", "launch/accelerate/zero2.yaml"]
    assert stop(command, signal.SIGUSR1, data, tmp_path / "run", **variables) == STOPPED_STATUS
    check_saved(tmp_path / "run", engine="ZeRO-2")
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("is_forwarded", [True, False], ids=["forward_signals", "python"])
def test_one_process_saves_and_says_so(is_forwarded: bool, number: signal.Signals, data: Path, tmp_path: Path):
    forwarded = ["launch/forward_signals.py", "--config_file", "launch/accelerate/one_process.yaml"] if is_forwarded else []
    command = [sys.executable, *forwarded, "tools/pretrain.py"]
    assert stop(command, number, data, tmp_path / "run") == STOPPED_STATUS
    check_saved(tmp_path / "run", engine="plain")


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_signals_on_and_the_run_saves(number: signal.Signals, data: Path, tmp_path: Path):
    """Its own status is 1 whatever the processes end with; SIGUSR1 it must be told of."""
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    status = stop(
        [*command, "--signals-to-handle", handled, "tools/pretrain.py"], number, data, tmp_path / "run",
        ACCELERATE_USE_CPU="true", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300",
    )  # fmt: skip
    assert status == 1
    check_saved(tmp_path / "run", engine="DDP")
