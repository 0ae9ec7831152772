"""The tiny scenes that the launches train on."""

from pathlib import Path

import pytest

from sycoca.data.scenes import write_scenes


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATA folder with `scenes32`: 60 training scenes in three shards, and 25 held out, an uneven share for two ranks."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "scenes32", num_train=60, num_val=25, size=32, samples_per_shard=20)
    return folder
