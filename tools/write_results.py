#!/usr/bin/env python
"""Write the results page from the records of the tools' `--record`.

    tools/write_results.py configs/results.yaml docs/results docs/results.md
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sycoca.cli import run_tool
from sycoca.config import load_config
from sycoca.results import PageConfig, write_page


def main() -> Mapping[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="which tables, with which rows and columns")
    parser.add_argument("records", type=Path, help="the folder of the records")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    arguments = parser.parse_args()
    config = load_config(PageConfig, arguments.config)
    page = write_page(config, arguments.records)
    arguments.page.write_text(page, encoding="utf-8")
    return {"page": str(arguments.page), "num_tables": len(config.sections)}


if __name__ == "__main__":
    run_tool(main)
