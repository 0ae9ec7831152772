"""What a run says: the console on standard error, one JSON line an event, and trackers."""

import json
import logging
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger("sycoca")


def set_up_console(*, is_main: bool) -> None:
    """Send the package's log lines to standard error; other ranks than the main one say warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    logger.propagate = False


def print_result(result: Mapping[str, Any]) -> None:
    """A tool's result: one JSON object, the last line of standard output."""
    print(json.dumps(result), flush=True)


class Tracker(Protocol):
    """Takes named numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """Appends one JSON object a line, flushed, so that a killed run leaves whole lines."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """Writes scalars for TensorBoard."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Writes to Weights & Biases; `pip install sycoca[wandb]`. A resumed run keeps its id, from `folder/wandb_id`."""

    def __init__(self, project: str, folder: Path, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]  optional

        path = folder / "wandb_id"
        if not path.is_file():
            path.write_text(secrets.token_hex(4))
        self._run = wandb.init(project=project, dir=str(folder), config=config, id=path.read_text(), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
