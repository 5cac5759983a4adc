"""Slow and GPU tests run when they are asked for: `pytest -m slow`, `pytest -m gpu`."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable matrix products on CUDA
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

import pytest
import torch

# These need Triton's interpreter, in a process of their own (see test_triton.py), or a GPU.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["interpreted"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small problems: threads would only cost time, and another number of them another rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
