"""Settings of every test: no network, and one thread, since tiny tensors gain nothing from more and every machine differs."""

import os
from collections import Counter

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported, which the server that processes are forks of does once
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="write the golden losses instead of comparing with them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first, where several processes share out the files: none is left to finish one alone."""
    if hasattr(config, "workerinput"):
        num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
