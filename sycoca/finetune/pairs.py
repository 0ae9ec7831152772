"""What retrieval and captioning share: image-caption pairs, read as the checkpoint that they start from reads them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sycoca.data.pipeline import DataConfig, build_train_loader
from sycoca.data.tokenizer import TokenizerConfig
from sycoca.distributed import rank, world_size
from sycoca.finetune.start import Start, StartConfig, check_tokenizer
from sycoca.pretrained import find_checkpoint
from sycoca.types import ConfigError


def read_as_trained(data: DataConfig, config: StartConfig, start: Start) -> DataConfig:
    """The data's settings with the checkpoint's tokenizer, and with the transform as `start_from` settled it.

    Raises ConfigError where another tokenizer is named, or captions may be longer than the checkpoint's model can read.
    """
    check_tokenizer(data)
    if data.max_tokens > start.config.max_tokens:
        raise ConfigError(
            f"data.max_tokens is {data.max_tokens} and {config.checkpoint} was trained for {start.config.max_tokens} at most; "
            f"set data.max_tokens={start.config.max_tokens} or less"
        )
    tokenizer = TokenizerConfig(name=str(find_checkpoint(Path(config.checkpoint)) / "tokenizer"))
    return data.model_copy(update={"tokenizer": tokenizer, "transform": start.config.transform})


def build_batches(data: DataConfig, start: Start, *, seed: int) -> Callable[[Any], Iterable[Any]]:
    """This rank's endless training batches, from a position that a checkpoint keeps."""

    def load_batches(position: Any) -> Iterable[Any]:
        return build_train_loader(data, start.tokenizer, seed=seed, rank=rank(), world_size=world_size(), resume=position)

    return load_batches
