"""SyCoCa: pretraining symmetric contrastive captioners."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`sycoca.load`, imported when it is first asked for: the networks' libraries take seconds to import."""
    if name == "load":
        from sycoca.pretrained import load

        return load
    raise AttributeError(f"module 'sycoca' has no attribute {name!r}")
