"""What the tests of callbacks share."""

import multiprocessing
import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet():
    """Hides what Lightning says of every small training."""
    with warnings.catch_warnings():
        for message in (
            "does not have many workers",
            "dirpath has changed",
            "callbacks used to create",
            "isinstance.treespec",
            "not empty",
        ):
            warnings.filterwarnings("ignore", f".*{message}")
        yield


@pytest.fixture(scope="session")
def fork():
    """What starts processes that have imported all that this one has, which takes most of a small training's time."""
    if torch.cuda.is_available():
        pytest.skip("autograd cannot fork where it has threads for a GPU: run with CUDA_VISIBLE_DEVICES= to hide it")
    return multiprocessing.get_context("fork")
