"""What several tests need."""

import os
from pathlib import Path

import pytest
import torch

# the networks of the tests are small, and two busy jobs of two threads each slow one another many times
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; a test that asks for it is skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared/data"
    if not folder.is_dir():
        pytest.skip("real data not found beside the project: ../shared/data")
    return folder
