"""The network of a recipe: its width and padding are those of its weights."""

import pytest
import torch

from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.recipes.training.networks import describe_network

SHAPE = (3, 32, 32)


def test_width_is_that_of_the_weights(unfolded, tmp_path):
    torch.save(mobilenet_v2(0.5).state_dict(), tmp_path / "half.pth")
    described = [describe_network(weights, SHAPE, 10) for weights in (str(tmp_path / "half.pth"), unfolded, "none")]
    assert [(one.name, one.arguments["width"]) for one in described] == [
        ("mobilenet_v2-w0.5", 0.5),
        ("mobilenet_v2-w0.5", 0.5),
        ("mobilenet_v2-w0.35", 0.35),
    ]


@pytest.mark.parametrize(
    ("weights", "width", "padding"),
    [
        ("mobilenet_v2_w035_keras_imagenet_notop.npz", 0.35, "keras"),
        ("mobilenet_v2-b0353104.pth", 1.0, "symmetric"),
    ],
)
def test_width_and_padding_of_real_weights(weights, width, padding, shared_data):
    arguments = describe_network(str(shared_data / "weights" / weights), SHAPE, 10).arguments
    assert (arguments["width"], arguments["padding"]) == (width, padding)
