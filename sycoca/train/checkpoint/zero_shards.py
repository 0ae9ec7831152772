"""DeepSpeed's own checkpoint files: collected in memory when saving, and made into whole weights again.

Imports DeepSpeed, which is slow: import this module only where its checkpoints are at hand.
"""

from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from tempfile import TemporaryDirectory
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from sycoca.train.checkpoint.snapshot import copy_to_cpu


class _Collector(TorchCheckpointEngine):
    """Takes what the engine would have written."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.collected[Path(path)] = copy_to_cpu(state_dict)


def collect_shards(engine: Any) -> tuple[str, dict[str, Any]]:
    """The tag of what this rank of a DeepSpeed engine saves, and the content of each file, by path: copies on the CPU.

    All ranks must call it. The few scripts that DeepSpeed copies beside its checkpoints are left out.
    """
    own, collector = engine.checkpoint_engine, _Collector()
    tag = f"global_step{engine.global_steps}"
    engine.checkpoint_engine = collector
    try:
        with TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag=tag, save_latest=False)
            return tag, {str(path.relative_to(folder)): content for path, content in collector.collected.items()}
    finally:
        engine.checkpoint_engine = own


def rebuild_weights(folder: Path) -> dict[str, Tensor]:
    """Whole weights from the shards of ZeRO-1, 2 or 3: with frozen and tied ones and buffers. float32, no memory shared."""
    with redirect_stdout(stderr):  # DeepSpeed prints; a tool's standard output ends in its result
        weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    states = folder / (folder / "latest").read_text().strip() / "mp_rank_00_model_states.pt"
    if states.is_file():  # of ZeRO-1 and 2; ZeRO-1 leaves frozen weights out of its shards, they stand whole in here
        module = torch.load(states, map_location="cpu", weights_only=False)["module"]
        weights |= {key: value for key, value in module.items() if key not in weights}
    return {key: value.float().clone() if value.is_floating_point() else value.clone() for key, value in weights.items()}
