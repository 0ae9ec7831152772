#!/usr/bin/env python
"""A check-up of an experiment before the hours are spent: data, tokenizer, masks, launch file, memory, time, learning.

    python tools/doctor.py configs/pretrain/NAME.yaml --launch launch/accelerate/zero2.yaml [key.sub=value ...]

A line a check on standard error: ok, warning or wrong, and what to do. The exit status is 1 where something is wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sycoca.cli import run_tool
from sycoca.config import load_config
from sycoca.doctor.checkup import CheckUp
from sycoca.doctor.report import Check, summary, table
from sycoca.log import set_up_console
from sycoca.train.pretrain import PretrainConfig

UNSOUND_STATUS = 1


def main() -> dict[str, Any]:
    options = _parse()
    set_up_console(is_main=False)
    config = load_config(PretrainConfig, options.config, options.overrides)
    checkup = CheckUp(config, _tell, options.launch, options.all)
    checkup.run()
    print(f"\n{table(checkup.checks)}", file=sys.stderr)
    return {"config": options.config, **checkup.figures, **summary(checkup.checks)}


def _tell(check: Check) -> None:
    print(f"checked: {check.name}: {check.status}", file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML of configs/pretrain/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--launch", type=Path, help="the launch file it will run with (launch/accelerate/*.yaml)")
    parser.add_argument("--all", action="store_true", help="read all shards, and decode every image; default: a sample")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    found: dict[str, Any] = {}
    run_tool(lambda: found.update(main()) or found)
    sys.exit(UNSOUND_STATUS if found["num_wrong"] else 0)
