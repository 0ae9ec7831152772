"""Captions a second of decoding with cached keys and values, against recomputing every token at each step.

    python benchmarks/decoding.py [--patch-size 16] [--num-tokens 30] [--batch-size 8]

Both sides go through sycoca.generation.decode, greedy, with exactly --num-tokens new tokens a caption, from patches encoded
beforehand; they must choose the same tokens. The model is a ViT-S with 6 + 6 text layers of width 384 and random weights. Sides
alternate in one process after a warm-up; the ratio is the median over rounds of cached / uncached. The table goes to standard
error; the last line of standard output is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor

from sycoca.data.tokenizer import build_tokenizer
from sycoca.generation import GenerationConfig, NextLogits, decode
from sycoca.models.decoding import CaptionStep
from sycoca.models.sycoca import ModelConfig, SyCoCa

WIDTH, NUM_HEADS, NUM_TEXT_LAYERS, IMAGE_SIZE, MAX_TOKENS = 384, 6, 6, 224, 76


class UncachedStep:
    """The model's plain forward over all tokens at each step, as a decoder without a cache has it (open_clip's `generate`).

    With --last-only it projects the last state alone to the vocabulary, which a careful caller could do.
    """

    is_last_only = False

    def __init__(self, model: SyCoCa, patch_BPD: Tensor):
        assert model.text is not None and model.text_decoder is not None
        self.text, self.decoder, self.memory = model.text, model.text_decoder, patch_BPD
        self.token_NT = torch.zeros(patch_BPD.shape[0], 0, dtype=torch.int64)

    def __call__(self, token_NT: Tensor, source_N: Tensor | None) -> Tensor:
        assert source_N is None, "greedy search keeps its rows"
        self.token_NT = torch.cat([self.token_NT, token_NT], dim=1)
        length_N = torch.full((len(self.token_NT),), self.token_NT.shape[1])
        token_NTD = self.text(self.token_NT, length_N)[0]
        if self.is_last_only:
            return self.decoder.vocabulary(self.decoder.stack(token_NTD, self.memory)[:, -1])
        return self.decoder(token_NTD, self.memory)[:, -1]


def main() -> None:
    args = _parse()
    UncachedStep.is_last_only = args.last_only
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer("clip")
    parts = {"text", "text_decoder"}
    model = SyCoCa(build_config(args.patch_size), vocab_size=tokenizer.vocab_size, max_tokens=MAX_TOKENS, parts=parts).eval()
    generation = GenerationConfig(min_tokens=args.num_tokens, max_tokens=args.num_tokens)
    prompt_N1 = torch.full((args.batch_size, 1), tokenizer.bos)
    with torch.no_grad():
        patch_BPD = model.vision(torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE))[0]

    def write(build_step: Callable[[SyCoCa, Tensor], NextLogits]) -> Tensor:
        return decode(build_step(model, patch_BPD), prompt_N1, generation, eos=tokenizer.eos).token_NJT

    result = compare(args, {"cached": lambda: write(CaptionStep), "uncached": lambda: write(UncachedStep)}, "captions")
    print(json.dumps({"benchmark": "decoding", "num_tokens": args.num_tokens, "threads": args.threads, **result}), flush=True)


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch-size", type=int, default=16, help="pixels (default 16)")
    parser.add_argument("--num-tokens", type=int, default=30, help=f"new tokens a caption, below {MAX_TOKENS} (default 30)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--last-only", action="store_true", help="uncached, but only the last state is projected")
    return parser.parse_args()


def build_config(patch_size: int, image_size: int = IMAGE_SIZE) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vision": {"name": "vit_small_patch16_224", "image_size": image_size, "options": {"patch_size": patch_size}},
            "text": {"width": WIDTH, "num_layers": NUM_TEXT_LAYERS, "num_heads": NUM_HEADS},
            "text_decoder": {"num_layers": NUM_TEXT_LAYERS},
        }
    )


def compare(args: Namespace, sides: dict[str, Callable[[], Tensor]], unit: str) -> dict[str, float]:
    """Units a second of the first side, and its ratio to the second; a call does `args.batch_size` of them."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        made = []
        for name, make in sides.items():
            start = time.perf_counter()
            made.append(make())
            if number:  # round 0 warms up
                rates[name].append(args.batch_size / (time.perf_counter() - start))
        torch.testing.assert_close(*made)  # token ids, or a loss: both sides must do the same
    for name, found in rates.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:9s} {statistics.median(found):7.2f} {unit}/s ({spread})", file=sys.stderr)
    first, second = rates.values()
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {f"{unit}_per_second": round(statistics.median(first), 2), "ratio": round(statistics.median(ratios), 3)}


if __name__ == "__main__":
    main()
