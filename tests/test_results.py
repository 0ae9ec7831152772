"""Records of tools, and the page that is written from them."""

import json
import sys
from pathlib import Path

import pytest

from sycoca.cli import run_tool
from sycoca.config import parse_config
from sycoca.results import PageConfig, write_page
from sycoca.types import DataError

PAGE = {
    "title": "Results",
    "sections": [
        {
            "title": "Retrieval",
            "text": "On ten photos.",
            "columns": {"R@1": "R@1", "rank": "rank"},
            "rows": [
                {"label": "ours", "record": "ours.json", "seed": 3},
                {"label": "chance", "figures": {"R@1": 10.0}},
            ],
        }
    ],
}


def write_record(folder: Path, **figures: float) -> None:
    record = {"command": "tools/measure.py --fast", "commit": "abc123", "seconds": 61.4, "torch": "2", "result": figures}
    (folder / "ours.json").write_text(json.dumps(record))


def test_a_row_shows_its_figures_seed_commit_time_and_command(tmp_path: Path):
    write_record(tmp_path, **{"R@1": 12.345, "rank": 4})
    page = write_page(parse_config(PageConfig, PAGE, source="tests"), tmp_path)
    assert "|  | R@1 | rank | seed | commit | time |" in page
    assert "| ours | 12.3 | 4.0 | 3 | abc123 | 1 min 01 s |" in page
    assert "| chance | 10.0 |  |  |  |  |" in page
    assert "# ours\ntools/measure.py --fast" in page


def test_a_missing_figure_or_record_is_one_clear_error(tmp_path: Path):
    config = parse_config(PageConfig, PAGE, source="tests")
    with pytest.raises(DataError, match=r"ours\.json: expected a record"):
        write_page(config, tmp_path)
    write_record(tmp_path, **{"R@1": 12.3})
    with pytest.raises(DataError, match="no figure 'rank'; it has R@1"):
        write_page(config, tmp_path)


def test_several_seeds_are_one_row_of_medians_with_their_spread(tmp_path: Path):
    for seed, cider in enumerate((30.0, 10.0, 20.0)):
        record = {"commit": "abc123", "seconds": seed, "result": {"CIDEr": cider, "aligned": {"R@1": 7.0, "i2t/R@1": seed}}}
        (tmp_path / f"fit_{seed}.json").write_text(json.dumps({**record, "command": f"tools/fit.py seed={seed}"}))
        (tmp_path / f"ours_{seed}.json").write_text(json.dumps({**record, "command": f"tools/measure.py {seed}"}))
    ours = {"label": "ours", "record": "ours_{seed}.json", "made_by": "fit_{seed}.json", "seed": [0, 1, 2]}
    whole = {"title": "Whole", "columns": {"CIDEr": "CIDEr", "aligned/R@1": "R@1", "speed": "speed"}}
    part = {"title": "Part", "columns": {"i2t/R@1": "R@1"}, "rows": [{**ours, "part": "aligned"}]}
    tree = {"title": "Results", "sections": [{**whole, "rows": [{**ours, "figures": {"speed": None}}]}, part]}
    page = write_page(parse_config(PageConfig, tree, source="tests"), tmp_path)
    assert "| ours | 20.0 (10.0 to 30.0) | 7.0 |  | 0, 1, 2 | abc123 | 1 s |" in page
    assert "| ours | 1.0 (0.0 to 2.0) | 0, 1, 2 | abc123 | 1 s |" in page
    assert "# ours\ntools/fit.py seed=0\ntools/measure.py 0\n" in page


def test_a_tool_records_what_it_prints_and_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    path = tmp_path / "new" / "record.json"
    monkeypatch.setattr(sys, "argv", ["tools/x.py", "--record", str(path), "a b"])
    run_tool(lambda: {"argv": sys.argv[1:]})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"argv": ["a b"]}
    record = json.loads(path.read_text())
    assert record["command"] == "tools/x.py 'a b'"
    assert record["result"] == {"argv": ["a b"]}
    assert record["seconds"] >= 0


def test_record_without_a_file_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["tools/x.py", "--record"])
    with pytest.raises(SystemExit):
        run_tool(dict)
    assert "error: --record: expected the JSON file" in capsys.readouterr().err
