"""SyCoCa: pretraining symmetric contrastive captioners."""

from sycoca.pretrained import load

__all__ = ["load"]
