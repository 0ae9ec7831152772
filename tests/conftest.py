"""Settings of every test: one thread, since tiny tensors gain nothing from more and every CI machine differs."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
