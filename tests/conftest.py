"""Settings of every test: one thread, since tiny tensors gain nothing from more and every CI machine differs."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="write the golden losses instead of comparing with them")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
