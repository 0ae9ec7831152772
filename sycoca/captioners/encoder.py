"""A frozen pair of encoders under a captioner: a checkpoint of ours, an open_clip model or a transformers CLIP, by name."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sycoca.data.transforms import TransformConfig, build_eval_transform
from sycoca.pretrained import find_checkpoint, load
from sycoca.types import CheckpointError

OPEN_CLIP, TRANSFORMERS = "open_clip:", "transformers:"
TEXT_BATCH = 256
"""Texts that go through the text tower at a time."""
MAX_LOGIT_SCALE = 100.0
"""Training clamps it so (CLIP, section 2.5); the checkpoint holds the parameter as it was before."""
_LOGIT_SCALE = "log_logit_scale"
"""The contrastive objective's parameter in a checkpoint of ours."""


@dataclass(frozen=True)
class Towers:
    """One pair of encoders. The functions take tensors on the module's device and give raw embeddings."""

    module: nn.Module
    """All weights that take part, and nothing else that matters to the embeddings."""
    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]
    patches: Callable[[Tensor], Tensor]
    transform: TransformConfig
    logit_scale: float | None


class FrozenEncoder:
    """Encodes images and texts, and is never trained. Satisfies DualEncoder.

    It is no module on purpose: nothing that holds one lists its weights as its own, moves them or puts them into training mode.
    """

    def __init__(self, name: str, towers: Towers, device: torch.device | str):
        self.name, self.device = name, torch.device(device)
        self.transform_config = towers.transform
        self.transform = build_eval_transform(towers.transform)
        self._towers = towers
        towers.module.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """BE float32, raw."""
        with torch.autocast(self.device.type, enabled=False):
            return self._towers.image(image_BCHW.to(self.device)).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """NE float32, raw; any number of texts. A text that is too long is cut."""
        batches = [list(texts[start : start + TEXT_BATCH]) for start in range(0, len(texts), TEXT_BATCH)]
        with torch.autocast(self.device.type, enabled=False):
            text_NE = torch.cat([self._towers.text(batch).float() for batch in batches or [["a"]]])
        return text_NE[: len(texts)]

    @torch.no_grad()
    def encode_patches(self, image_BCHW: Tensor) -> Tensor:
        """BPD float32: the patch states, that cross-attention reads.

        Of a CLIP the last block's states before the final norm, the class token's first (as SmallCap's weights expect
        them); of a checkpoint of ours the patch tokens that captions are written from. Raises ConfigError without patches.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self._towers.patches(image_BCHW.to(self.device)).float()

    @property
    def logit_scale(self) -> float:
        """What training multiplied cosines with. Raises CheckpointError where the checkpoint does not say."""
        if self._towers.logit_scale is None:
            raise CheckpointError(f"{self.name} holds no logit scale: it was trained without contrast, or exported without it")
        return self._towers.logit_scale

    @cached_property
    def embed_width(self) -> int:
        """E."""
        return self.encode_text(["a"]).shape[-1]

    @cached_property
    def patch_width(self) -> int:
        """D of the patch states."""
        size = self.transform_config.size
        return self.encode_patches(torch.zeros(1, 3, size, size)).shape[-1]

    @cached_property
    def fingerprint(self) -> str:
        """16 characters of the weights and the image transform: stores and aligners keep it and refuse another."""
        config = self.transform_config
        facts = (config.size, config.mean, config.std, config.interpolation, config.eval)
        return hash_weights(self._towers.module, facts)


def load_encoder(name: str, device: torch.device | str = "cpu") -> FrozenEncoder:
    """A frozen encoder by name, in float32.

    name: a checkpoint or run folder of ours; `open_clip:ViT-L-14/openai` (or `/weights.pt` for the tag,
    `open_clip:local-dir:FOLDER`, `open_clip:hf-hub:OWNER/NAME`); `transformers:openai/clip-vit-large-patch14` (or a folder).
    Raises CheckpointError or ConfigError, which say what was expected.
    """
    if name.startswith((OPEN_CLIP, TRANSFORMERS)):
        from sycoca.captioners.clip_towers import open_clip_towers, transformers_towers  # slow to import, ours do without

    if name.startswith(OPEN_CLIP):
        return FrozenEncoder(name, open_clip_towers(name.removeprefix(OPEN_CLIP)), device)
    if name.startswith(TRANSFORMERS):
        return FrozenEncoder(name, transformers_towers(name.removeprefix(TRANSFORMERS)), device)
    return FrozenEncoder(name, _own_towers(Path(name)), device)


def hash_weights(module: nn.Module, facts: object) -> str:
    """16 characters that tell one network with its facts (plain data) from another, on any device."""
    digest = hashlib.sha256(repr(facts).encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _own_towers(path: Path) -> Towers:
    from safetensors import safe_open

    try:
        folder = find_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; for other encoders write {OPEN_CLIP}MODEL/WEIGHTS or {TRANSFORMERS}NAME_OR_FOLDER"
        ) from error
    subject = load(folder)
    if "contrast" not in subject.model.parts:
        raise CheckpointError(f"{path} was trained without contrast: it has no shared space of images and texts")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key.rpartition(".")[2] == _LOGIT_SCALE]  # noqa: SIM118  it is no dict
        scales = [min(MAX_LOGIT_SCALE, file.get_tensor(key).exp().item()) for key in keys]
    config: TransformConfig = subject.config.transform
    return Towers(
        module=subject.model, image=subject.encode_image, text=subject.encode_text, patches=subject.encode_patches,
        transform=config, logit_scale=scales[0] if len(scales) == 1 else None,
    )  # fmt: skip
