"""Short runs of the training recipes, and what they start from."""

from collections.abc import Callable
from typing import Any

import pytest

from microtune.recipes.training.networks import DescribedNetwork, describe_network


@pytest.fixture
def train(called, tiny_run, tmp_path) -> Callable[..., dict[str, Any]]:
    """Calls ``train("train_cifar", epochs=2)``: one epoch, and everything else as the recipe has it by default."""

    def call(recipe, **changed):
        defaults = {"epochs": 1, "scheme": None, "learning_rate": None}
        return called(recipe, **tiny_run(recipe) | defaults | {"out_dir": tmp_path / "run"} | changed)

    return call


@pytest.fixture
def two_steps(limited) -> None:
    """Lets runs end after two batches of training and one of each other split."""
    limited(limit_train_batches=2, limit_val_batches=1, limit_test_batches=1)


@pytest.fixture
def folded(finished_runs) -> str:
    """Weights without batch norm, which know the tiny CIFAR."""
    return str(finished_runs["train_cifar"] / "last.ckpt")


@pytest.fixture
def unfolded(unfolded_run) -> str:
    """Weights with batch norm, of width 0.5, which know the tiny CIFAR."""
    return str(unfolded_run / "last.ckpt")


@pytest.fixture(scope="session")
def described() -> DescribedNetwork:
    """MobileNetV2-0.35 at 32 px for 10 classes; not to be trained."""
    return describe_network("none", (3, 32, 32), 10)
