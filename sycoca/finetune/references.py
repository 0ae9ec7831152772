"""The reward of self-critical training: CIDEr-D of a caption against all references of its image."""

from collections.abc import Mapping, Sequence

from sycoca.data.caption_texts import read_shard_captions
from sycoca.data.pipeline import DataConfig
from sycoca.data.position import DropLog
from sycoca.data.shards import expand_shards
from sycoca.distributed import gather_objects, rank, world_size
from sycoca.evaluation.cider import CiderScorer
from sycoca.evaluation.ptb_tokenizer import tokenize_caption
from sycoca.types import DataError, image_of

END = "<end>"
"""Stands for the end of a caption as a word; the tokenizer of captions never gives it."""

References = Mapping[str, Sequence[str]]
"""Tokenised captions by image."""


class CiderReward:
    """CIDEr-D in [0, 10] of a written caption, with the document frequencies of all references (arXiv:1612.00563).

    An ended caption and every reference have one word more, for the end: without it a caption that breaks off after "on a" is
    rated as one that does not (Hu et al., arXiv:2305.12254).
    """

    def __init__(self, references: References):
        self._scorer = CiderScorer({image: [_ended(text) for text in texts] for image, texts in references.items()})

    def __call__(self, caption: str, key: str, *, is_ended: bool) -> float:
        """`key` is the sample's; a caption that reached its limit without an end token is not `is_ended`."""
        words = tokenize_caption(caption)
        return self._scorer.score(_ended(words) if is_ended else words, image_of(key))


def read_references(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """Every caption of the training shards in words, by image; ranks share the shards, and each gets the whole.

    The shards are read once, images included and not decoded. Raises DataError where there is no usable caption.
    """
    shards = [
        (name, config.captions_of(source))
        for source in config.mixed()
        for name in expand_shards(source.shards, allow_pipe=config.allow_pipe)
    ]
    access = config.access(f"references/{rank()}")
    own: dict[str, tuple[str, ...]] = {}
    drops = DropLog(config.max_bad_share)
    for shard, captions in shards[rank() :: world_size()]:
        for image, texts in read_shard_captions(shard, captions, drops, max_bytes=config.max_bytes, access=access):
            own[image] = own.get(image, ()) + tuple(map(tokenize_caption, texts))
    whole: dict[str, tuple[str, ...]] = {}
    for share in gather_objects(own):
        for image, texts in share.items():
            whole[image] = whole.get(image, ()) + texts
    if not whole:
        raise DataError(f"data.shards: no captions to compare with; {drops.describe_worst()}")
    return whole


def _ended(words: str) -> str:
    return f"{words} {END}" if words else END
