"""A run on two processes that is killed, stopped, starved of disk and fed by a bad network, against one that is left alone.

    python -m tests.distributed.soak --steps 400 --faults 16 --seed 0

Both train the smoke configuration with dropout and random masks. The disturbed one reads its shards from a server that drops,
truncates, stalls, resets and answers 500; at steps drawn from the seed one of its ranks gets SIGKILL, the launcher SIGTERM,
or a rank can write no file any more. It is started again with the same command until it is done. Every loss it ever logs
must be the one of the undisturbed run at that step, and so must the last weights, bit by bit.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from sycoca.data.scenes import write_scenes
from sycoca.train.checkpoint.stop import STOPPED_STATUS
from tests.data.faulty_server import FaultyServer, serve
from tests.smoke.launching import ROOT, SMOKE, environment, losses

SIGKILL, SIGTERM, DISK_FULL = "SIGKILL", "SIGTERM", "disk full"
KINDS = (SIGKILL, SIGTERM, DISK_FULL)
FAULT_SHARE = 0.2
"""Of the requests to the server."""
NEAREST, FURTHEST = 3, 40
"""Steps from one fault to the next; the last may so be drawn for one after the run's end."""
SCRIPT = "tools/pretrain.py"
MAX_LAUNCHES, TIMEOUT = 200, 1800


@dataclass
class Soak:
    """What is run, and what came of it."""

    folder: Path
    num_steps: int
    num_faults: int
    random: Random
    launch_file: str
    furthest: int = FURTHEST
    met: Counter[str] = field(default_factory=Counter)
    num_launches: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    def start(self, name: str, shards: str) -> subprocess.Popen[str]:
        """Launch the run of this name; what it says goes through a pipe, as a file would be full as well."""
        self.num_launches += 1
        settings = [
            f"run.folder={self.folder / name}", f"optim.num_steps={self.num_steps}", f"data.shards=[{shards}]",
            "data.num_workers=1", "data.shards_per_group=1", "objectives.tg_mim.mask=random", "model.text.dropout=0.1",
            "run.checkpoint_every=10", "run.sample_every=0", "evaluate.every=0", "run.num_kept=2",
            "data.remote={num_attempts: 20, stall_seconds: 1, backoff_seconds: 0.05, max_backoff_seconds: 0.5}",
        ]  # fmt: skip
        command = [sys.executable, "launch/forward_signals.py", "--config_file", self.launch_file, "--num_processes", "2"]
        return subprocess.Popen(
            [*command, "--main_process_port", "0", SCRIPT, SMOKE, *settings], cwd=ROOT, env=environment(self.folder), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def disturb(self, launcher: subprocess.Popen[str], name: str) -> str:
        """Wait for a step, do harm, and give what the run said; without harm where it ended before."""
        at_step = steps_done(self.folder / name) + self.random.randint(NEAREST, self.furthest)
        kind = self.random.choice(KINDS)
        with tempfile.TemporaryFile("w+") as said:
            drain = subprocess.Popen(["cat"], stdin=launcher.stderr, stdout=said, stderr=said)
            while launcher.poll() is None and steps_done(self.folder / name) < min(at_step, self.num_steps - 2):
                time.sleep(0.02)
            if launcher.poll() is None and sum(self.met.values()) < self.num_faults:
                self._harm(launcher, kind)
            started = family(launcher)
            status = launcher.wait(timeout=TIMEOUT)
            for process in started:  # what a killed rank's launcher left behind
                if process.is_running():
                    process.kill()
            drain.wait(timeout=TIMEOUT)
            self.statuses[str(status)] += 1
            said.seek(0)
            return said.read()

    def _harm(self, launcher: subprocess.Popen[str], kind: str) -> None:
        ranks = ranks_of(launcher)
        if not ranks:
            return
        self.met[kind] += 1
        if kind == SIGTERM:
            launcher.send_signal(signal.SIGTERM)
        elif kind == SIGKILL:
            self.random.choice(ranks).send_signal(signal.SIGKILL)
        else:
            resource.prlimit(self.random.choice(ranks).pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def family(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes that a launcher started and that still run."""
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes, not their loader processes."""
    found = [process for process in family(launcher) if SCRIPT in process.cmdline()]
    numbers = {process.pid for process in found}
    return [process for process in found if process.ppid() not in numbers]


def steps_done(folder: Path) -> int:
    """The last step in the log; 0 without one."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def compare(left_alone: Path, disturbed: Path) -> dict[str, float | int | bool]:
    """Every logged loss, and the last weights, of both runs."""
    expected, found = dict(losses(left_alone)), losses(disturbed)
    weights, others = (load_file(folder / "checkpoints/last/model.safetensors") for folder in (left_alone, disturbed))
    return {
        "steps_run": len(found), "steps_run_again": len(found) - len({step for step, _ in found}),
        "losses_that_differ": sum(values != expected[step] for step, values in found),
        "are_weights_equal": weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights),
        "first_loss": expected[1]["loss"], "last_loss": expected[max(expected)]["loss"],
    }  # fmt: skip


def soak(
    folder: Path, *, num_steps: int, num_faults: int, seed: int, launch_file: str, furthest: int = FURTHEST
) -> dict[str, Any]:
    """Run both and compare them. Raises RuntimeError where a run ends for another reason than the harm done to it."""
    begun = time.monotonic()
    write_scenes(folder / "scenes32", num_train=240, num_val=2, size=32, samples_per_shard=20)
    plan = Soak(folder, num_steps, num_faults, Random(seed), launch_file, furthest)
    names = sorted(path.name for path in (folder / "scenes32").glob("train-*.tar"))
    alone = plan.start("alone", ",".join(str(folder / "scenes32" / name) for name in names))
    said = alone.communicate(timeout=TIMEOUT)[1]
    if alone.returncode != 0:
        raise RuntimeError(said[-3000:])
    plan.num_launches = 0
    server = FaultyServer(folder / "scenes32", seed=seed, fault_share=FAULT_SHARE)
    with serve(server) as url:
        shards = ",".join(f"{url}/{name}" for name in names)
        while plan.num_launches < MAX_LAUNCHES:
            before = sum(plan.met.values())
            launcher = plan.start("disturbed", shards)
            said = plan.disturb(launcher, "disturbed")
            print(f"launch {plan.num_launches}: step {steps_done(folder / 'disturbed')}, {dict(plan.met)}", file=sys.stderr)
            if launcher.returncode == 0:
                break
            if sum(plan.met.values()) == before and launcher.returncode != STOPPED_STATUS:
                raise RuntimeError(f"ended with {launcher.returncode} though nothing was done to it:\n{said[-3000:]}")
    network = {kind: number for kind, number in sorted(server.seen.items()) if kind not in ("ok", "range")}
    return {
        "seed": seed, "launch_file": launch_file, "steps": num_steps, "launches": plan.num_launches, "faults": dict(plan.met),
        "network_faults": network, "statuses": dict(plan.statuses), **compare(folder / "alone", folder / "disturbed"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--faults", type=int, default=16, help="of processes and disks; the network's come besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launch-file", default="launch/accelerate/ddp.yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(
            Path(folder), num_steps=options.steps, num_faults=options.faults, seed=options.seed, launch_file=options.launch_file
        )
    print(json.dumps(found))
    is_same = found["are_weights_equal"] and not found["losses_that_differ"]
    sys.exit(0 if is_same else 1)


if __name__ == "__main__":
    main()
