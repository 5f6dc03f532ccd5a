"""Schemes that trials are judged by: distinct, within the budget, of every kind, and the same for the same seed."""

import pytest

from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.user_error import UserError
from microtune.recipes.search.gradient_search import measure_gradient
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import described_by
from microtune.recipes.studies.sampled_schemes import DRAWN, is_like, kind_of, sampled_schemes
from microtune.recipes.studies.way_schemes import budget_by_name


@pytest.fixture(scope="module")
def sampled():
    settings = TrialSettings("digits", resolution=32, base_depth=12, batch_size=64)
    described, measured = described_by(settings), measure_gradient(settings, 128, 0)

    def sample(count=24, seed=0, kib=16):
        return described, sampled_schemes(described, measured, budget_by_name(f"extra{kib}"), 12, count, seed)

    return sample


def test_they_are_distinct_within_the_budget_and_of_every_kind(sampled):
    described, schemes = sampled()
    assert len(schemes) == 24
    operations = described.operations
    for name, scheme in schemes.items():
        scheme.check(operations.convolutions, described.name)
        assert extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme) <= 16 * 1024
        assert scheme.bias_depth <= 12
        assert scheme.provenance["kind"] == kind_of(name)
    values = list(schemes.values())
    assert not any(is_like(one, other) for i, one in enumerate(values) for other in values[:i])
    kinds = {kind_of(name) for name in schemes}
    assert {"one_pass", "one_pass_layers", "last_layers", *DRAWN} <= kinds
    for name, scheme in schemes.items():
        if kind_of(name).endswith("_layers"):
            assert set(scheme.weights.values()) <= {1.0}


def test_the_seed_decides(sampled):
    (_, one), (_, again), (_, other) = sampled(), sampled(), sampled(seed=1)
    assert one == again
    assert {name: scheme.weights for name, scheme in one.items()} != {name: s.weights for name, s in other.items()}


def test_too_few_schemes_are_an_error(sampled):
    with pytest.raises(UserError, match=r"there are only \d+ of 300 schemes within .*: give fewer --schemes"):
        sampled(300, kib=1)
