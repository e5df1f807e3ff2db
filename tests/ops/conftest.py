"""Device of the kernel tests, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """See tests/conftest.py: parts of Triton look at the variable when a kernel runs."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
