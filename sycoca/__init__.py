"""SyCoCa: pretraining symmetric contrastive captioners."""

from typing import Any

__all__ = ["load", "load_captioner"]


def __getattr__(name: str) -> Any:
    """What is named above, imported when it is first asked for: the networks' libraries take seconds to import."""
    if name == "load":
        from sycoca.pretrained import load

        return load
    if name == "load_captioner":
        from sycoca.captioners.captioner_loading import load_captioner

        return load_captioner
    raise AttributeError(f"module 'sycoca' has no attribute {name!r}")
