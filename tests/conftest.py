"""What all tests share: one thread, a fixed seed, a cache of their own."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the models are too small for more, and a busy machine makes threads wait


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The index cache of shards goes to a temporary folder, never into the user's home."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
