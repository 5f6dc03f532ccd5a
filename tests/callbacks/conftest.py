"""What the tests of callbacks share."""

import warnings

import pytest


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
