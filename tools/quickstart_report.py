#!/usr/bin/env python
"""What the quickstart's model can do, on held-out scenes: a table on standard error, figures as JSON.

    tools/quickstart_report.py runs/quickstart data/scenes
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sycoca.cli import run_tool
from sycoca.train.quickstart import GOALS, measure


def main() -> Mapping[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder or a checkpoint")
    parser.add_argument("scenes", type=Path, help="the folder that make_scenes.py wrote")
    arguments = parser.parse_args()
    figures = measure(arguments.run, arguments.scenes)
    table = Table(title=f"SyCoCa on held-out scenes ({arguments.run})")
    for heading in ("", "measured", "chance", "goal"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, goal in GOALS.items():
        table.add_row(goal.label, f"{figures[name]:{goal.form}}", goal.chance, goal.goal)
    console = Console(file=sys.stderr)
    console.print(table)
    for picture in sorted((arguments.run / "samples").glob("*.png"))[-1:]:
        console.print(f"A picture of what it sees, rebuilds and writes: {picture}")
    return figures


if __name__ == "__main__":
    run_tool(main)
