"""The results page: tables of figures from the records that the tools wrote, each row with its command, commit and time."""

import json
from pathlib import Path
from typing import Any

from sycoca.config import Config
from sycoca.types import DataError

PREAMBLE = "<!-- Written by tools/write_results.py from the runs' own records: do not edit. -->\n"


class Row(Config):
    """One line of a table: what a tool measured, or figures that are known otherwise (chance, a floor)."""

    label: str
    record: str | None = None
    """File name of a tool's `--record`."""
    figures: dict[str, float] = {}
    seed: int | None = None


class Section(Config):
    """One table."""

    title: str
    text: str = ""
    columns: dict[str, str]
    """Heading by the figure's name in the records."""
    digits: int = 1
    rows: list[Row]


class PageConfig(Config):
    """What the page shows, and in which order."""

    title: str
    text: str = ""
    sections: list[Section]


def write_page(config: PageConfig, records: Path) -> str:
    """The page in Markdown. Raises DataError for a record, or a figure in it, that is missing."""
    parts = [PREAMBLE, f"\n# {config.title}\n\n", config.text.strip() + "\n" if config.text else ""]
    for section in config.sections:
        text = f"\n{section.text.strip()}\n" if section.text else ""
        parts += [f"\n## {section.title}\n", text, write_table(section, records)]
    return "".join(parts)


def write_table(section: Section, records: Path) -> str:
    """A table of figures, and under it the command of each row that has one."""
    headings = ["", *section.columns.values(), "seed", "commit", "time"]
    lines = ["", _line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
    commands = []
    for row in section.rows:
        record = _read(records / row.record) if row.record else None
        figures = record["result"] if record else row.figures
        missing = [name for name in section.columns if record and name not in figures]
        if missing:
            raise DataError(f"{records / str(row.record)}: no figure {missing[0]!r}; it has {', '.join(sorted(figures))}")
        values = [f"{figures[name]:.{section.digits}f}" if name in figures else "" for name in section.columns]
        facts = [str(record["commit"] or ""), _duration(record["seconds"])] if record else ["", ""]
        lines.append(_line([row.label, *values, "" if row.seed is None else str(row.seed), *facts]))
        commands += [f"# {row.label}\n{record['command']}"] if record else []
    listing = ["", "```sh", *commands, "```", ""] if commands else [""]
    return "\n".join([*lines, *listing])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: expected a record of a tool's --record; run the tool, or remove the row: {error}") from error
