#!/usr/bin/env python
"""`accelerate launch` that passes SIGTERM and SIGUSR1 on to the training processes and ends with their status.

    launch/forward_signals.py --config_file launch/accelerate/ddp.yaml tools/pretrain.py configs/pretrain/NAME.yaml

The launchers alone lose both. With one process accelerate passes no signal on. With several, torchrun knows SIGTERM only, kills
what is not done 30 seconds later (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), and ends with status 1 whatever the processes said.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """The status of the training processes: the first that is not 0."""
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's option: it leaves the forwarded ones to us
    arguments = launch_command_parser().parse_args()
    script = arguments.training_script

    def forward(number: int, frame: FrameType | None) -> None:
        for process in psutil.Process().children():
            if script in process.cmdline():
                process.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
