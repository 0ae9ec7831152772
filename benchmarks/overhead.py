"""What looking on costs: log lines, watchdog and checkpoints as a share of a training step.

    python benchmarks/overhead.py [--steps 40] [--rounds 5] [--batch-size 16]

A small SyCoCa (ViT of width 128 and 4 layers at 64 pixels, as the quickstart's) on one random batch, float32, one process.
Sides alternate in one run, through the real loop and hooks: `bare` without any, `log` with a log line every step (JSONL,
TensorBoard is off), `watchdog` with its thread, `checkpoint` with one checkpoint in the steps, written in the background
(copied before the first, counted after the last, which waits for it), `norms` with the gradient norms of every objective at
every tenth step. The share is the median over rounds of side / bare - 1. The table goes to standard error; the
last line of standard output is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sycoca.log import JsonlTracker
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import ModelConfig, SyCoCa
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.checkpoint.loading import Trainee
from sycoca.train.checkpoint.saving import Saver
from sycoca.train.diagnosis.flops import find_counter
from sycoca.train.diagnosis.grad_norms import GradNormHook
from sycoca.train.diagnosis.watchdog import Watchdog
from sycoca.train.hooks import LogHook, Speed
from sycoca.train.loop import Hook, TrainState, train
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.train.task import PretrainTask, needed_parts
from sycoca.types import Batch

VOCAB_SIZE, MAX_TOKENS, IMAGE_SIZE, NORMS_EVERY = 1000, 40, 64, 10
OBJECTIVES = {
    "itc": ContrastiveConfig(), "ic": CaptioningConfig(weight=2.0, drop_share=0.5), "tg_mim": MaskedImageConfig(),
}  # fmt: skip


def main() -> None:
    args = _parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    trainee = build_trainee(args.steps)
    batch = build_batch(args.batch_size)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = build_sides(args, trainee, folder)
        for number in range(args.rounds + 1):
            for side, run in sides.items():
                started = time.perf_counter()
                run(batch)
                if number:  # round 0 warms up
                    seconds.setdefault(side, []).append((time.perf_counter() - started) / args.steps)
    print(json.dumps({"benchmark": "overhead", "threads": args.threads, **compare(seconds)}), flush=True)


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of each measured run (default 40)")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side (default 5)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    return parser.parse_args()


def build_trainee(num_steps: int) -> Trainee:
    vision = {"name": "vit_tiny_patch16_224", "image_size": IMAGE_SIZE,
              "options": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}}  # fmt: skip
    tower = {"width": 128, "num_layers": 2, "num_heads": 4}
    config = ModelConfig.model_validate(
        {"vision": vision, "embed_width": 128, "text": tower, "text_decoder": {"num_layers": 2},
         "image_decoder": {"width": 64, "num_layers": 2, "num_heads": 4}}
    )  # fmt: skip
    model = SyCoCa(config, vocab_size=VOCAB_SIZE, max_tokens=MAX_TOKENS, parts=needed_parts(OBJECTIVES))
    task = PretrainTask(model, OBJECTIVES, RelevanceConfig())
    accelerator = Accelerator(cpu=True)
    return Trainee(accelerator, *accelerator.prepare(task, build_optimizer(task, plan_of(num_steps))))


def plan_of(num_steps: int) -> OptimConfig:
    return OptimConfig(lr=1e-4, num_steps=num_steps, warmup_steps=1)


def build_batch(num_pairs: int) -> Batch:
    length_B = torch.randint(8, MAX_TOKENS, (num_pairs,))
    image = torch.randn(num_pairs, 3, IMAGE_SIZE, IMAGE_SIZE)
    token_BL = torch.randint(VOCAB_SIZE, (num_pairs, MAX_TOKENS))
    keys = [f"photo_{number}" for number in range(num_pairs)]
    position = {"num_dropped": {}, "worst": None, "worker": 0}
    return Batch(image=image, token=token_BL, length=length_B, key=keys, position=position)


def build_sides(args: Namespace, trainee: Trainee, folder: Path) -> dict[str, Callable[[Batch], None]]:
    """Each trains by `--steps` steps, with something looking on."""
    task: Any = trainee.task
    tracker = JsonlTracker(folder / "log.jsonl")

    def run(batch: Batch, hooks: list[Hook], state: TrainState, watch: AbstractContextManager[Any]) -> None:
        with watch:
            train(
                task, repeat(batch), trainee.optimizer, accelerator=trainee.accelerator, plan=plan_of(args.steps), state=state,
                hooks=hooks,
            )  # fmt: skip

    def log(batch: Batch) -> None:
        run(batch, [LogHook(1, args.steps, [tracker], Speed(find_counter(task)))], TrainState(), nullcontext())

    def watchdog(batch: Batch) -> None:
        state = TrainState()
        run(batch, [], state, Watchdog(state.clock, folder, rank=0, world_size=1, stall_seconds=600, abort_seconds=0))

    def checkpoint(batch: Batch) -> None:
        saver = Saver(Path(tempfile.mkdtemp(dir=folder)), trainee, lambda path: None, is_background=True)
        saver.begin(TrainState(), metrics={})
        run(batch, [], TrainState(), nullcontext())
        saver.finish()

    def norms(batch: Batch) -> None:
        run(batch, [GradNormHook(NORMS_EVERY, task, [tracker])], TrainState(), nullcontext())

    return {"bare": lambda batch: run(batch, [], TrainState(), nullcontext()), "log": log, "watchdog": watchdog,
            "checkpoint": checkpoint, "norms": norms}  # fmt: skip


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    for side, found in seconds.items():
        spread = f"{min(found) * 1e3:.1f} to {max(found) * 1e3:.1f}"
        print(f"{side:10s} {statistics.median(found) * 1e3:8.1f} ms a step ({spread})", file=sys.stderr)
    bare = seconds.pop("bare")
    shares = {side: [one / base - 1 for one, base in zip(found, bare, strict=True)] for side, found in seconds.items()}
    return {
        "bare_ms": round(statistics.median(bare) * 1e3, 2),
        **{f"{side}_share": round(statistics.median(found), 4) for side, found in shares.items()},
        **{f"{side}_spread": [round(min(found), 4), round(max(found), 4)] for side, found in shares.items()},
    }


if __name__ == "__main__":
    main()
