"""Any checkpoint as one file of weights, proven: read again, compared key by key, and run."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sycoca.config import load_config
from sycoca.data.tokenizer import build_tokenizer
from sycoca.models.sycoca import SyCoCa
from sycoca.pretrained import MODEL_PREFIX, PretrainedConfig, load_weights
from sycoca.train.checkpoint.checksums import list_damage
from sycoca.train.checkpoint.loading import read_meta
from sycoca.train.checkpoint.snapshot import NEWEST
from sycoca.types import Batch, CheckpointError, ConfigError

Choice = Literal["newest", "averaged"]
_WHOLE = "model.safetensors"
_MAX_NAMED = 5


def consolidate(checkpoint: Path, out: Path, *, choice: Choice, from_shards: bool = False) -> dict[str, Any]:
    """Write the newest or the averaged weights of a checkpoint to `out`, a safetensors file; gives what was found.

    DeepSpeed's shards, where there are some, are made into whole weights and must equal the newest ones bit for bit.
    `from_shards` takes the weights from them, also where the checkpoint's own whole ones are lost. What was written is read
    again, and compared with its source by keys, by values and by a forward pass. Raises CheckpointError for any difference.
    """
    meta, shards = read_meta(checkpoint), checkpoint / "state" / "deepspeed"
    damage = [line for line in list_damage(checkpoint) if not (from_shards and line.startswith((_WHOLE, f"state/{NEWEST}")))]
    if damage:
        raise CheckpointError(f"{checkpoint} is damaged: {damage[0]}; use the checkpoint before it")
    if from_shards and (choice == "averaged" or not shards.is_dir()):
        raise CheckpointError(f"{checkpoint}: --from-shards gives the newest weights of a ZeRO checkpoint only")
    if choice == "averaged" and not meta["num_averaged"]:
        raise CheckpointError(f"{checkpoint} holds no running average of the weights; use --weights newest")
    newest = checkpoint / ("state/" + NEWEST if meta["num_averaged"] else _WHOLE)
    rebuilt = _rebuild(shards) if shards.is_dir() else None
    if rebuilt is not None and newest.is_file() and not list_damage(checkpoint):
        require_equal(rebuilt, load_file(newest), names=("DeepSpeed's shards", str(newest)))
    source = rebuilt if from_shards else load_file(newest if choice == "newest" else checkpoint / _WHOLE)
    assert source is not None, "there are shards"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(source, out)
    written = load_file(out)
    require_equal(written, source, names=(str(out), str(checkpoint)))
    return {
        "file": str(out), "step": meta["step"], "engine": meta["engine"], "weights": choice, "num_tensors": len(written),
        "num_values": sum(value.numel() for value in written.values()), "are_shards_equal": rebuilt is not None,
        "is_forward_equal": compare_forward(checkpoint, written, source),
    }  # fmt: skip


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, names: tuple[str, str]) -> None:
    """Raises CheckpointError that lists keys which only one side has, or whose tensors differ in shape, type or a bit."""
    problems = [f"{key} is missing in {names[0]}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} is missing in {names[1]}" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(found.keys() & expected.keys()):
        if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key]):
            problems.append(f"{key} differs")
    if problems:
        more = f" (and {len(problems) - _MAX_NAMED} more)" if len(problems) > _MAX_NAMED else ""
        raise CheckpointError(f"{names[0]} and {names[1]} differ: {'; '.join(problems[:_MAX_NAMED])}{more}")


def compare_forward(checkpoint: Path, written: dict[str, Tensor], source: dict[str, Tensor]) -> bool | None:
    """Whether the network gives the same features with both; None where the checkpoint does not describe a SyCoCa."""
    try:
        config = load_config(PretrainedConfig, checkpoint / "model.yaml")
    except ConfigError:  # of another kind of model: its keys and values have been compared
        return None
    first, second = (_features(checkpoint, config, weights) for weights in (written, source))
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        raise CheckpointError(f"{checkpoint}: the network gives other features with the consolidated weights")
    return True


def _rebuild(shards: Path) -> dict[str, Tensor]:
    from sycoca.train.checkpoint.zero_shards import rebuild_weights  # imports DeepSpeed: slow, and other checkpoints do without

    return rebuild_weights(shards)


@torch.no_grad()
def _features(checkpoint: Path, config: PretrainedConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tokenizer = build_tokenizer(checkpoint / "tokenizer")
    offline = config.model.model_copy(update={"vision": config.model.vision.model_copy(update={"pretrained": False})})
    model = SyCoCa(offline, vocab_size=tokenizer.vocab_size, max_tokens=config.max_tokens, parts=set(config.parts)).eval()
    mine = {key.removeprefix(MODEL_PREFIX): value for key, value in weights.items() if key.startswith(MODEL_PREFIX)}
    load_weights(model, mine, source=str(checkpoint))
    size = config.transform.size
    token, length = tokenizer.tokenize(["a red circle", "two dogs on grass"], config.max_tokens)
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = model.encode(Batch(image=image, token=token, length=length, key=["0", "1"], position={}))
    named = {name: getattr(features, name) for name in ("patch_BPD", "token_BLD", "summary_BD", "image_BE", "text_BE")}
    found = {name: value for name, value in named.items() if value is not None}
    if model.text_decoder is not None:
        found["loss"] = model.text_decoder(features.token_BLD, features.patch_BPD, token)
    return found
