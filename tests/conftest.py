"""Shared by all tests. Being here also puts this folder on the path, so that tests can import `tiny`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # Tiny tensors gain nothing from threads and lose much on a busy machine.
    torch.set_num_threads(1)
