"""From a captioner's folder to a captioner of images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sycoca.captioners.captioner import LightCaptioner, Written, read_captioner
from sycoca.captioners.cgtgan import CgTGan
from sycoca.captioners.recap import ReCap
from sycoca.captioners.sitta import Sitta
from sycoca.captioners.smallcap import SmallCap
from sycoca.types import DataError

KINDS: dict[str, type[LightCaptioner]] = {
    ReCap.kind: ReCap,
    SmallCap.kind: SmallCap,
    CgTGan.kind: CgTGan,
    Sitta.kind: Sitta,
}
"""Every captioner by its kind."""


class LoadedCaptioner:
    """Captions images. What lies beneath, for batches of pixels, is `light`."""

    def __init__(self, light: LightCaptioner):
        self.light = light

    def caption(self, images: Sequence[Image.Image], keys: Sequence[str] | None = None) -> list[str]:
        """One caption an image, the same for an image in any company. With keys, an image of a datastore does not get its own
        captions."""
        return [written.caption for written in self.explain(images, keys)]

    def explain(self, images: Sequence[Image.Image], keys: Sequence[str] | None = None) -> list[Written]:
        """Captions with what was retrieved, what was chosen among, and how that was rated."""
        if not images:
            return []
        transform = self.light.encoder.transform
        image_BCHW = torch.stack([transform(image.convert("RGB")) for image in images])
        return self.light.explain(image_BCHW, [""] * len(images) if keys is None else keys)


def load_light(folder: Path, device: torch.device | str = "cpu") -> LightCaptioner:
    """The captioner of a folder, for batches of pixels. Raises DataError, CheckpointError, ConfigError."""
    kind = read_captioner(folder)["captioner"]
    if kind not in KINDS:
        raise DataError(f"{folder}: a captioner of the kind {kind!r}; expected one of {', '.join(sorted(KINDS))}")
    return KINDS[kind].load(folder, device)


def load_captioner(path: str | Path, device: torch.device | str = "cpu") -> LoadedCaptioner:
    """The captioner that `tools/captioner.py fit` left in a folder, for PIL images. Raises as `load_light`."""
    return LoadedCaptioner(load_light(Path(path), device))
