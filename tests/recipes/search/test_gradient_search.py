"""The gradient that a search goes by is always that of the same samples."""

import pytest
import torch

from microtune.recipes.search.gradient_search import measure_gradient
from microtune.recipes.search.options import TrialSettings


@pytest.mark.parametrize(("asked", "taken", "measured"), [(70, 70, 38), (10**6, 90, 58), (20, 20, 20)])
def test_gradient_is_of_as_many_samples_as_asked_for_or_there_are(asked, taken, measured, tiny_cifar):
    """The first of the training's order: the same ones every time, and nothing else is drawn.

    The classifier has the first half of the batches of 32, and the gradient the others; of a single one both.
    """
    settings = TrialSettings("cifar10", str(tiny_cifar), width=0.35, resolution=32, base_depth=3)
    state = torch.get_rng_state()
    found = [measure_gradient(settings, asked, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert [(one.samples, one.importance.samples) for one in found] == [(taken, measured)] * 3
    assert len(found[0].importance.layers) == 3
    of_samples = [[layer.activation for layer in one.importance.layers.values()] for one in found]
    first, again, other = map(torch.cat, of_samples)
    assert torch.equal(first, again)
    largest = first.max()
    assert not torch.allclose(first / largest, other / largest, rtol=1e-4, atol=0)
