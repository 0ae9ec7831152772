"""What every tool shares: run its main, print one JSON line, and turn a user's mistake into one clear line."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.state import PartialState, is_initialized

from sycoca.log import print_result
from sycoca.types import CheckpointError, ConfigError, DataError

USER_ERROR_STATUS = 2
_FROM_LOADER = re.compile(r"Caught (\w+) in DataLoader worker process.*\n(?:[\w.]+\.)?\1: (?P<message>.*)", re.DOTALL)
"""What torch makes of an error in a loader's process: the same type, with the whole traceback as its message."""


def run_tool(main: Callable[[], Mapping[str, Any]]) -> None:
    """Print what `main` returns as the last line of standard output, on rank 0.

    A user's mistake, or an OSError that names a file, becomes `error: ...` on standard error and exit status 2;
    any other exception keeps its traceback.
    """
    try:
        result = main()
    except (ConfigError, DataError, CheckpointError) as error:
        _exit_with(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with(f"{error.filename}: {error.strerror}")
    else:
        if not is_initialized() or PartialState().is_main_process:  # the process group may have ended: no rank to ask for
            print_result(result)


def _exit_with(message: str) -> None:
    in_loader = _FROM_LOADER.match(message)
    line = " ".join((in_loader["message"] if in_loader else message).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
