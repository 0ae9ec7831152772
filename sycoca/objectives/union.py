"""The objectives that a configuration can name. A new one is a file beside this and a line here."""

from typing import Annotated

from pydantic import Field

from sycoca.objectives.captioning import CaptioningConfig
from sycoca.objectives.contrastive import ContrastiveConfig
from sycoca.objectives.masked_image import MaskedImageConfig

AnyObjectiveConfig = Annotated[
    ContrastiveConfig | CaptioningConfig | MaskedImageConfig,
    Field(discriminator="type"),
]
