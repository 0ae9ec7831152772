"""One training step (forward, backward, AdamW) of ours against open_clip's CoCa of the same size: samples/s and peak memory.

    python benchmarks/train_step.py --captions dataset_flickr8k.json [--patch-size 16|32] [--precision fp32|bf16] [--memory]

Size: a ViT-S (width 384, 12 layers, 6 heads) at 224 px and 6 + 6 text layers of width 384, context 76, CLIP's tokens, batch 16.
Sides: ours with ITC and IC (that is CoCa), the whole SyCoCa step (also a second, half-image encoding and 4 image decoder
blocks), and open_clip.coca_model.CoCa with its default 256 pooler queries, open_clip.CoCaLoss and AdamW as open_clip_train
builds it. All see the same random images and the same captions, tokenised before the clock starts, ours padded to the
longest of the batch as our loader does, open_clip's to 76 as its tokenizer does. Sides alternate in one process, after a
warm-up step of each; a ratio is the median over rounds of ours / open_clip. Losses are not compared: weights are random.

--memory instead gives each side a process of its own and two steps, and reads its peak resident set (Linux' VmHWM: a child's
ru_maxrss begins at its parent's). `memory_ratio` is of whole processes; `memory_ratio_above_imports` leaves out what the
imports took.

--captions is Karpathy's json (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip) or a text file with a
caption a line; their lengths decide how much trimming saves, so take those of the data you mean to train on.
The table goes to standard error; the last line of standard output is JSON.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip_train.precision import get_autocast
from torch import Tensor

from sycoca.data.collate import num_columns
from sycoca.data.tokenizer import build_tokenizer, pad_rows
from sycoca.models.masking import RelevanceConfig
from sycoca.models.sycoca import ModelConfig, SyCoCa
from sycoca.objectives.base import ObjectiveConfig
from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.objectives.masked_image import MaskedImageConfig
from sycoca.train.optim import OptimConfig, build_optimizer
from sycoca.train.task import PretrainTask, needed_parts
from sycoca.types import Batch

WIDTH, NUM_HEADS, NUM_LAYERS, NUM_TEXT_LAYERS, IMAGE_SIZE = 384, 6, 12, 6, 224
MAX_TOKENS, VOCAB_SIZE = 76, 49408
ROUND_TO = 8
"""Our loader's default, `data.round_to`."""
LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.2, (0.9, 0.98), 1e-6

ITC = ContrastiveConfig()
OBJECTIVES: dict[str, dict[str, ObjectiveConfig]] = {
    "ours ITC+IC": {"itc": ITC, "ic": CaptioningConfig(weight=2.0)},
    "ours SyCoCa": {"itc": ITC, "ic": CaptioningConfig(weight=2.0, drop_share=0.5), "tg_mim": MaskedImageConfig()},
}
PEER = "open_clip CoCa"
SIDES = (*OBJECTIVES, PEER)

Step = Callable[[Tensor, list[str]], Callable[[], None]]
"""From images and captions to a call that trains on them; what the data loader does is done before that call."""


def main() -> None:
    args = _parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    captions = read_captions(args.captions)
    if args.one_side:
        print(json.dumps(measure_memory(args, args.one_side, captions)), flush=True)
        return
    size = {"patch_size": args.patch_size, "precision": args.precision, "batch_size": args.batch_size}
    result = compare_memory(args) if args.memory else compare_speed(args, captions)
    print(json.dumps({"benchmark": "train_step", **size, "threads": args.threads, **result}), flush=True)


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True, help="Karpathy's json, or a text file with a caption a line")
    parser.add_argument("--patch-size", type=int, default=16, help="pixels; 16 or 32 (default 16)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of speed")
    parser.add_argument("--one-side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_captions(path: Path) -> list[str]:
    """Captions of Karpathy's json, the first of each image, or the lines of a text file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [image["sentences"][0]["raw"] for image in json.loads(text)["images"]]
    return [line.strip() for line in text.splitlines() if line.strip()]


def compare_speed(args: Namespace, captions: list[str]) -> dict[str, float]:
    steps = {name: build_side(args, name) for name in SIDES}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number, (images, texts) in enumerate(itertools.islice(make_batches(args, captions), args.rounds + 1)):
        for name, prepare in steps.items():
            train = prepare(images, texts)
            start = time.perf_counter()
            train()
            if number:  # round 0 makes the optimisers' state and warms up the allocator
                rates[name].append(args.batch_size / (time.perf_counter() - start))
    for name, found in rates.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:15s} {statistics.median(found):7.2f} samples/s ({spread})", file=sys.stderr)
    return {
        f"{short_name(name)}_ratio": round(statistics.median(a / b for a, b in zip(rates[name], rates[PEER], strict=True)), 3)
        for name in OBJECTIVES
    }


def compare_memory(args: Namespace) -> dict[str, float]:
    """Before this process builds anything, so that the machine's memory is the children's."""
    own = [sys.executable, *sys.argv]
    peaks = {}
    for name in SIDES:
        child = subprocess.run([*own, "--one-side", name], check=True, stdout=subprocess.PIPE, text=True)
        peaks[name] = json.loads(child.stdout.splitlines()[-1])
        print(f"{name:15s} {peaks[name]['peak']:8.0f} MB, of which imports {peaks[name]['imports']:6.0f}", file=sys.stderr)
    ratios = {}
    for name in OBJECTIVES:
        ours, theirs = peaks[name], peaks[PEER]
        above = (ours["peak"] - ours["imports"]) / (theirs["peak"] - theirs["imports"])
        ratios[f"{short_name(name)}_memory_ratio"] = round(ours["peak"] / theirs["peak"], 3)
        ratios[f"{short_name(name)}_memory_ratio_above_imports"] = round(above, 3)
    return ratios


def measure_memory(args: Namespace, name: str, captions: list[str]) -> dict[str, float]:
    """Megabytes: the peak after two steps, and what importing both sides had taken."""
    imports = peak_megabytes()
    prepare = build_side(args, name)
    for images, texts in itertools.islice(make_batches(args, captions), 2):
        prepare(images, texts)()
    return {"peak": peak_megabytes(), "imports": imports}


def peak_megabytes() -> float:
    """The largest resident set this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux reports VmHWM"
    return int(found[1]) / 1024


def make_batches(args: Namespace, captions: list[str]):
    """Random images with the file's captions, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(captions), (args.batch_size,), generator=generator).tolist()
        images = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        yield images, [captions[number] for number in chosen]


def short_name(name: str) -> str:
    """The key of a side in the JSON."""
    return name.removeprefix("ours ").lower().replace("+", "_")


def build_side(args: Namespace, name: str) -> Step:
    return build_peer(args) if name == PEER else build_ours(args, OBJECTIVES[name])


def build_ours(args: Namespace, objectives: dict[str, ObjectiveConfig]) -> Step:
    """A step as sycoca.train takes it, less gradient clipping, which open_clip leaves out by default."""
    tokenizer = build_tokenizer("clip")
    model = SyCoCa(
        ours_config(args.patch_size),
        vocab_size=tokenizer.vocab_size,
        max_tokens=MAX_TOKENS,
        parts=needed_parts(objectives),
    )
    task = PretrainTask(model, objectives, RelevanceConfig(), is_bf16=args.precision == "bf16").train()
    plan = OptimConfig(lr=LR, num_steps=1, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS)
    optimizer = build_optimizer(task, plan)

    def prepare(images: Tensor, texts: list[str]) -> Callable[[], None]:
        rows = [tokenizer.encode(text, MAX_TOKENS) for text in texts]
        columns = num_columns(max(map(len, rows)), round_to=ROUND_TO, max_tokens=MAX_TOKENS)
        token_BL, length_B = pad_rows(rows, columns, tokenizer.pad)
        keys = [str(number) for number in range(len(texts))]
        batch = Batch(image=images, token=token_BL, length=length_B, key=keys, position={})

        def train() -> None:
            task(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

        return train

    return prepare


def ours_config(patch_size: int) -> ModelConfig:
    text = {"width": WIDTH, "num_layers": NUM_TEXT_LAYERS, "num_heads": NUM_HEADS}
    vision = {"name": "vit_small_patch16_224", "image_size": IMAGE_SIZE, "options": {"patch_size": patch_size}}
    return ModelConfig.model_validate(
        {
            "vision": vision,
            "embed_width": WIDTH,
            "text": text,
            "text_decoder": {"num_layers": NUM_TEXT_LAYERS},
            "image_decoder": {"num_layers": 4, "num_heads": NUM_HEADS},
        }
    )


def build_peer(args: Namespace) -> Step:
    """open_clip's CoCa, loss and optimiser, stepped as in open_clip_train.train.train_one_epoch."""
    model = build_open_clip(args.patch_size).train()
    compute_losses = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    optimizer = build_peer_optimizer(model)
    autocast = get_autocast({"fp32": "fp32", "bf16": "amp_bfloat16"}[args.precision], device_type="cpu")
    tokenize = open_clip.SimpleTokenizer(context_length=MAX_TOKENS)

    def prepare(images: Tensor, texts: list[str]) -> Callable[[], None]:
        token_BL = tokenize(texts)

        def train() -> None:
            optimizer.zero_grad()
            with autocast():
                loss = sum(compute_losses(**model(images, token_BL), output_dict=True).values())
            assert isinstance(loss, Tensor)
            loss.backward()
            optimizer.step()

        return train

    return prepare


def build_open_clip(patch_size: int) -> CoCa:
    """coca_ViT-B-32.json with other widths, layers and heads; its vocabulary projection, left uninitialised, is filled."""
    tower = {"context_length": MAX_TOKENS, "vocab_size": VOCAB_SIZE, "width": WIDTH, "heads": NUM_HEADS}
    vision = {"image_size": IMAGE_SIZE, "layers": NUM_LAYERS, "width": WIDTH, "patch_size": patch_size}
    model = CoCa(
        embed_dim=WIDTH,
        vision_cfg={**vision, "attentional_pool": True, "attn_pooler_heads": 8, "output_tokens": True},
        text_cfg={**tower, "layers": NUM_TEXT_LAYERS, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**tower, "layers": NUM_TEXT_LAYERS, "attn_pooler_heads": 8},
    )
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.02)  # as it stands it may hold NaN, which is slow
    return model


def build_peer_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """open_clip_train.main's two groups and AdamW arguments."""
    named = list(model.named_parameters())
    plain = {name for name, p in named if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))}
    groups = [
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
        {"params": [p for name, p in named if name not in plain], "weight_decay": WEIGHT_DECAY},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


if __name__ == "__main__":
    main()
