"""What several tests need."""

import os
from pathlib import Path

import pytest
import torch

from microtune.modules.int8.files import tensor_shapes
from microtune.modules.int8.graph import (
    InvertedResidual,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
    QuantizedGraph,
)

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


@pytest.fixture
def small_graph() -> QuantizedGraph:
    """An int8 network of 32 px and 10 classes: with and without expansion and addition, padded as PyTorch and Keras."""
    relu = Quantization(6 / 255, -128)
    image, first, second, summed = (Quantization(s, z) for s, z in ((2 / 255, 0), (0.05, -4), (0.04, 7), (0.06, 2)))

    def convolution(in_channels, out_channels, given, output, kernel=1, stride=1, groups=1, padding=(0, 0, 0, 0)):
        return QuantizedConvolution(
            in_channels, out_channels, (kernel, kernel), (stride, stride), padding, groups, given, output
        )

    around, behind = (1, 1, 1, 1), (0, 1, 0, 1)
    blocks = (
        InvertedResidual(
            None,
            convolution(8, 8, relu, relu, kernel=3, groups=8, padding=around),
            convolution(8, 8, relu, first),
            addition=None,
        ),
        InvertedResidual(
            convolution(8, 24, first, relu),
            convolution(24, 24, relu, relu, kernel=3, groups=24, padding=around),
            convolution(24, 8, relu, second),
            addition=summed,
        ),
        InvertedResidual(
            convolution(8, 24, summed, relu),
            convolution(24, 24, relu, relu, kernel=3, stride=2, groups=24, padding=behind),
            convolution(24, 16, relu, second),
            addition=None,
        ),
    )
    return QuantizedGraph(
        name="small-int8",
        input_shape=(3, 32, 32),
        input=image,
        normalization=((128 / 255,) * 3, (0.5,) * 3),
        first_conv=convolution(3, 8, image, relu, kernel=3, stride=2, padding=around),
        blocks=blocks,
        feature_mix=None,
        classifier=QuantizedClassifier(16, 10, input=second, output=None),
    )


@pytest.fixture
def small_tensors(small_graph) -> dict[str, torch.Tensor]:
    """Random weights of the small network, scaled so that most outputs lie within int8 and some saturate."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (dtype, shape) in tensor_shapes(small_graph).items():
        if dtype == torch.int8:
            tensors[name] = torch.randint(-128, 128, shape, dtype=dtype, generator=random)
        elif dtype == torch.int32:
            tensors[name] = torch.randint(-4000, 4001, shape, dtype=dtype, generator=random)
        elif name.endswith(".weight_scales"):
            fan_in = tensors[name.removesuffix("_scales")][0].numel()
            tensors[name] = (torch.rand(shape, generator=random) + 0.5) * 0.02 / fan_in**0.5
        else:
            tensors[name] = torch.randn(shape, generator=random) * 0.1
    return tensors
