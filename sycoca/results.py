"""The results page: tables of figures from the records that the tools wrote, each row with its command, commit and time."""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sycoca.config import Config
from sycoca.types import DataError

PREAMBLE = "<!-- Written by tools/write_results.py from the runs' own records: do not edit. -->\n"


class Row(Config):
    """One line of a table: what a tool measured, or figures that are known otherwise (chance, a floor)."""

    label: str
    record: str | None = None
    """File name of a tool's `--record`; with `{seed}` in it, one file for each of the seeds."""
    made_by: str | None = None
    """The record, named the same way, of the tool that made what was measured; its command is shown too."""
    part: str = ""
    """Where in the record the figures are: those under this name alone, without it."""
    figures: dict[str, float | None] = {}
    """Known otherwise, or null for what the record need not have."""
    seed: int | list[int] | None = None
    """Several: the row shows medians and, where they differ, from which figure to which they go."""

    def seeds(self) -> list[int | None]:
        """One for each record."""
        return list(self.seed) if isinstance(self.seed, list) else [self.seed]


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
    """A table of figures, and under it the commands of each row that has any (of its first seed)."""
    headings = ["", *section.columns.values(), "seed", "commit", "time"]
    lines = ["", _line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
    commands = []
    for row in section.rows:
        read = _read_all(records, row.record, row)
        figures = [_figures(record, row, section.columns, records) for record in read] or [row.figures]
        values = [_summary([found.get(name) for found in figures], section.digits) for name in section.columns]
        seeds = ", ".join(str(seed) for seed in row.seeds() if seed is not None)
        commits = ", ".join(sorted({str(record["commit"] or "") for record in read}))
        time = _duration(statistics.median(record["seconds"] for record in read)) if read else ""
        lines.append(_line([row.label, *values, seeds, commits, time]))
        shown = [*_read_all(records, row.made_by, row)[:1], *read[:1]]
        commands += ["\n".join([f"# {row.label}", *(record["command"] for record in shown)])] if shown else []
    listing = ["", "```sh", *commands, "```", ""] if commands else [""]
    return "\n".join([*lines, *listing])


def _read_all(records: Path, name: str | None, row: Row) -> list[dict[str, Any]]:
    return [_read(records / name.replace("{seed}", str(seed))) for seed in row.seeds()] if name is not None else []


def _figures(record: Mapping[str, Any], row: Row, columns: Mapping[str, str], records: Path) -> dict[str, float | None]:
    """A record's figures by name, those in parts as `part/name`. Raises DataError where a column has none."""
    prefix = f"{row.part}/" if row.part else ""
    named = {name.removeprefix(prefix): value for name, value in _flat(record["result"]) if name.startswith(prefix)}
    figures = {**row.figures, **named}
    missing = [name for name in columns if name not in figures]
    if missing:
        raise DataError(f"{records / str(row.record)}: no figure {missing[0]!r}; it has {', '.join(sorted(figures))}")
    return figures


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", leaf) for inner, leaf in _flat(value))
        else:
            yield name, value


def _summary(values: list[float | None], digits: int) -> str:
    """The median and, of several that differ in what is shown, the lowest and the highest."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(found), min(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


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
