"""What every tool shares: run its main, print one JSON line, and turn a user's mistake into one clear line.

Every tool takes `--record FILE` beside its own options: what it prints is then also written there, with the command, the commit
and the time it took, for the results page (tools/write_results.py).
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState, is_initialized

from sycoca.config import Schema, load_config
from sycoca.log import print_result
from sycoca.types import CheckpointError, ConfigError, DataError, TrainingError

USER_ERROR_STATUS = 2
_FROM_LOADER = re.compile(r"Caught (\w+) in DataLoader worker process.*\n(?:[\w.]+\.)?\1: (?P<message>.*)", re.DOTALL)
"""What torch makes of an error in a loader's process: the same type, with the whole traceback as its message."""


def read_experiment(schema: type[Schema], description: str | None) -> Schema:
    """The configuration that the command line names: `CONFIG [key.sub=value ...]`. Raises ConfigError."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    arguments = parser.parse_args()
    return load_config(schema, arguments.config, arguments.overrides)


def run_tool(main: Callable[[], Mapping[str, Any]]) -> None:
    """Print what `main` returns as the last line of standard output, on rank 0.

    With `--record FILE` among the arguments it is written there too. A user's mistake, or an OSError that names a file,
    becomes `error: ...` on standard error and exit status 2; any other exception keeps its traceback.
    """
    started = time.monotonic()
    try:
        path = _take_record_option()
        facts = {"command": shlex.join(sys.argv), "commit": _commit() if path else None}  # before: the source may move on
        result = main()
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        _exit_with(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with(f"{error.filename}: {error.strerror}")
    else:
        if not is_initialized() or PartialState().is_main_process:  # the process group may have ended: no rank to ask for
            print_result(result)
            if path is not None:
                _record(path, facts, time.monotonic() - started, result)


def _take_record_option() -> Path | None:
    """Remove `--record FILE` from the arguments, which the tool's own parser does not know."""
    if "--record" not in sys.argv:
        return None
    place = sys.argv.index("--record")
    if place + 1 == len(sys.argv):
        raise ConfigError("--record: expected the JSON file to write")
    path = Path(sys.argv[place + 1])
    del sys.argv[place : place + 2]
    return path


def _commit() -> str | None:
    """The commit of the source, where it lies in a repository."""
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or None


def _record(path: Path, facts: Mapping[str, Any], seconds: float, result: Mapping[str, Any]) -> None:
    facts = {**facts, "seconds": round(seconds, 1), "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "result": dict(result)}, indent=1) + "\n", encoding="utf-8")


def _exit_with(message: str) -> None:
    in_loader = _FROM_LOADER.match(message)
    line = " ".join((in_loader["message"] if in_loader else message).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
