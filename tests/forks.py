"""Real processes that start at once: forks of a server, one for each process of pytest, that has imported the library."""

import io
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
PRELOADED = ["sycoca.train.pretrain", "sycoca.train.checkpoint.zero_shards", "transformers.models.auto.tokenization_auto"]
"""The second brings DeepSpeed."""
TIMEOUT = 600


def fork_context() -> Any:
    """What makes processes that have `PRELOADED`; the functions they run must be importable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(work: Callable[..., Any], world: int, *arguments: Any, **environment: str) -> list[Any]:
    """What `work(*arguments)` returns on each rank of one launch on the CPU; fails where a rank does.

    The process group's address is in the environment, as a launcher leaves it; who works must start the group.
    """
    context, port = fork_context(), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = []
    for number, (_, sender) in enumerate(pipes):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        ranks.append(context.Process(target=_run_rank, args=(place | environment, work, arguments, sender)))
        ranks[-1].start()
        sender.close()
    try:
        return _receive({receiver: number for number, (receiver, _) in enumerate(pipes)})
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()


def _receive(number_of: dict[Any, int]) -> list[Any]:
    """The ranks' answers, as they come: who waits for a rank that failed must not hide what it says."""
    found: dict[int, Any] = {}
    while number_of:
        ready = wait(list(number_of), timeout=TIMEOUT)
        if not ready:
            pytest.fail(f"ranks {sorted(number_of.values())} said nothing in {TIMEOUT} s")
        for receiver in ready:
            number = number_of.pop(receiver)
            try:
                answer = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
            except EOFError:
                pytest.fail(f"rank {number} ended without a word")
            if "failure" in answer:
                pytest.fail(f"rank {number}: {answer['failure']}")
            found[number] = answer["found"]
    return [found[number] for number in sorted(found)]


def _run_rank(environment: Mapping[str, str], work: Callable[..., Any], arguments: Sequence[Any], sender: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        answer = {"found": work(*arguments)}
        if dist.is_initialized():
            dist.barrier()  # none leaves while another still works: its own end would be an abort
    except BaseException:
        answer = {"failure": traceback.format_exc()}
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    sender.send_bytes(buffer.getvalue())
    if dist.is_initialized():
        dist.destroy_process_group()


def zero_stages() -> Iterator[int]:
    """ZeRO's stages, in each as if this process had been launched anew for it: launchers say in the environment what to use."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    for stage in (1, 2, 3):
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
        yield stage


def run_script(command: Sequence[str], environment: Mapping[str, str]) -> CompletedProcess[str]:
    """As `python SCRIPT ARGUMENTS...` in the repository's root, with what it prints and its status."""
    with TemporaryDirectory() as folder:
        said = {number: Path(folder) / str(number) for number in (1, 2)}
        process = fork_context().Process(target=_run_script, args=(list(command), dict(environment), said))
        process.start()
        process.join(timeout=TIMEOUT)
        is_late = process.is_alive()
        process.kill()
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in said.values())
        if is_late:
            pytest.fail(f"{' '.join(command)} did not end in {TIMEOUT} s\n{err[-3000:]}")
        return CompletedProcess(command, process.exitcode, out, err)


def _run_script(command: list[str], environment: dict[str, str], said: Mapping[int, Path]) -> None:
    for number, path in said.items():
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes: as in a launch, not as this process was made
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
