"""Fixtures of all CPU tests. What belongs to one folder is in the conftest.py of that folder."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import tiny_models as checkpoints


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread: tensors this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """Writers of random checkpoints, and `transformers` as the reference: tests/support/tiny_models."""
    return checkpoints
