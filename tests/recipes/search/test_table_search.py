"""The search by a contribution table: its network is that of the data."""

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.table_search import searched_network


def test_network_is_that_of_the_data():
    settings = TrialSettings("digits", resolution=32)
    assert searched_network(settings, None, 3, 5).input_shape == (1, 32, 32)


@pytest.mark.parametrize(("width_px", "shape"), [(None, (2, 48, 48)), (40, (2, 48, 40))])
def test_network_without_data(width_px, shape):
    described = searched_network(TrialSettings(width=0.5, resolution=48), width_px, 2, 7)
    assert (described.name, described.input_shape) == ("mobilenet_v2-w0.5", shape)
    assert described.arguments["num_classes"] == 7


def test_trials_need_a_validation_split(tiny_cifar):
    """Data can do without one, trials cannot."""
    settings = TrialSettings("cifar10", str(tiny_cifar), {"validation_fraction": 0}, resolution=32)
    with pytest.raises(UserError, match="trials are judged on the validation split: leave validation_fraction 0 out"):
        searched_network(settings, None, 3, 10)
