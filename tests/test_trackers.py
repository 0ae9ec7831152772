"""Weights & Biases, where it is installed: offline, for real."""

from pathlib import Path

import pytest

from sycoca.log import WandbTracker


def test_a_resumed_run_goes_on_in_wandb_under_its_own_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="pip install sycoca[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = WandbTracker("sycoca", tmp_path, {"seed": 0})
        tracker.write(step, {"loss": 1.0})
        tracker.close()
    kept = (tmp_path / "wandb_id").read_text()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs and all(name.endswith(f"-{kept}") for name in runs)
