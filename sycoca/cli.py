"""What every tool shares: run its main, print one JSON line, and turn a user's mistake into one clear line."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from sycoca.distributed import rank
from sycoca.log import print_result
from sycoca.types import CheckpointError, ConfigError, DataError

USER_ERROR_STATUS = 2


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
        if rank() == 0:
            print_result(result)


def _exit_with(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
