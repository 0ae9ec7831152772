"""What fitting costs: ReCap's linear map against one epoch of SmallCap, on the same stored features.

    OMP_NUM_THREADS=2 python benchmarks/captioner_fit.py configs/captioner/smallcap_scenes.yaml [key.sub=value ...]

Embeddings and patch states are there before either clock starts, and so are datastore and retrieval, which both need. The map
is fitted --fits times, the median counts; an epoch is --steps of SmallCap's steps, after a warm-up, times what an epoch has
(--steps 0 takes all of them). Steps run on the GPU where there is one, the map on the CPU. The table goes to standard error;
the last line of standard output is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice

from accelerate import Accelerator

from sycoca.captioners.alignment import AlignmentConfig, fit_image_to_text
from sycoca.captioners.embeddings import EmbeddingStore
from sycoca.captioners.encoder import load_encoder
from sycoca.captioners.smallcap import build_smallcap
from sycoca.config import load_config
from sycoca.finetune.smallcap import SmallCapFit, SmallCapTable, SmallCapTask, build_job
from sycoca.train.diagnosis.phases import PhaseClock
from sycoca.train.loop import take_step, to_device
from sycoca.train.optim import build_optimizer
from sycoca.train.run import start_engine

NUM_WARM_UP = 3


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(SmallCapFit, args.config, [*args.overrides, f"run.folder={folder}"])
        accelerator = start_engine(config, batch_size=config.data.batch_size)
        encoder = load_encoder(config.encoder, accelerator.device)
        train = config.pairs.open(encoder)
        map_seconds = statistics.median(time_map(train, config.captioner.alignment) for _ in range(args.fits))
        captioner = build_smallcap(encoder, config.captioner.lm.load(accelerator.device), train, config.captioner)
        table = SmallCapTable(captioner, train, config.data)
        task = SmallCapTask(captioner, is_bf16=config.run.is_bf16)
        num_steps = -(-len(table.keys) // config.data.batch_size)
        step_seconds = time_steps(config, accelerator, task, table, num=args.steps or num_steps)
    epoch_seconds = step_seconds * num_steps
    result = {
        "map_seconds": map_seconds, "epoch_seconds": epoch_seconds, "ratio": epoch_seconds / map_seconds,
        "step_seconds": step_seconds, "num_steps": num_steps, "num_pairs": len(table.keys), "embed_width": train.embed_width,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:16s} {value:12.4f}", file=sys.stderr)
    measured = args.steps or num_steps
    rounded = {name: round(value, 4) for name, value in result.items()}
    print(json.dumps({"benchmark": "captioner_fit", "steps_measured": measured, **rounded}), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of SmallCap")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--steps", type=int, default=100, help="measured; 0 is a whole epoch")
    parser.add_argument("--fits", type=int, default=5, help="of the map")
    return parser.parse_args()


def time_map(train: EmbeddingStore, config: AlignmentConfig) -> float:
    """Seconds of one fit: transforms, sums and the solution, from the files on."""
    start = time.perf_counter()
    fit_image_to_text(train, config)
    return time.perf_counter() - start


def time_steps(config: SmallCapFit, accelerator: Accelerator, task: SmallCapTask, table: SmallCapTable, *, num: int) -> float:
    """Mean seconds of a step as the trainer takes it, its batch made in between."""
    optimizer = build_optimizer(task, config.optim)
    prepared, prepared_optimizer = accelerator.prepare(task, optimizer)
    batches = iter(build_job(config, task, table, None).load_batches(None))
    prepared.train()
    started = 0.0
    for number, batch in enumerate(islice(batches, NUM_WARM_UP + num)):
        if number == NUM_WARM_UP:
            started = time.perf_counter()
        moved = to_device(batch, accelerator.device)
        taken = take_step(
            prepared, moved, prepared_optimizer, accelerator=accelerator, plan=config.optim, clock=PhaseClock()
        )
        taken.metrics["loss"].item()  # waits for the device
    return (time.perf_counter() - started) / num


if __name__ == "__main__":
    main()
