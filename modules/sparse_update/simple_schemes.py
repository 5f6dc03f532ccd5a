"""Update schemes by rule, with no search: what a searched one has to beat."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from microtune.modules.networks.operations import Convolution, NetworkOperations
from microtune.modules.sparse_update.update_scheme import UpdateScheme

Fits = Callable[[UpdateScheme], bool]


def classifier_only(network: str) -> UpdateScheme:
    """Updates nothing but the classifier.

    Args:
        network: Name of the network, as in ``UpdateScheme``.
    """
    return UpdateScheme(network, bias_depth=0, provenance={"rule": "classifier only"})


def full_update(network: str, operations: NetworkOperations) -> UpdateScheme:
    """Updates every weight and bias."""
    weights = {convolution.name: 1.0 for convolution in operations.convolutions}
    return UpdateScheme(network, len(weights), weights, provenance={"rule": "full update"})


def biases_that_fit(network: str, operations: NetworkOperations, fits: Fits) -> UpdateScheme | None:
    """Updates the biases of as many of the last layers as fit, and no weight.

    Args:
        network: Name of the network.
        operations: Of the network.
        fits: Whether a scheme is within the budget.
    """
    depths = range(len(operations.convolutions), -1, -1)
    provenance = {"rule": "biases of the last layers that fit"}
    return _first_that_fits((UpdateScheme(network, depth, provenance=provenance) for depth in depths), fits)


def last_layers_that_fit(network: str, operations: NetworkOperations, fits: Fits) -> UpdateScheme | None:
    """Updates weights and biases of as many of the last layers as fit: the usual partial fine-tuning."""
    names = [convolution.name for convolution in operations.convolutions]
    provenance = {"rule": "last layers that fit"}
    candidates = (
        UpdateScheme(network, depth, dict.fromkeys(names[len(names) - depth :], 1.0), provenance=provenance)
        for depth in range(len(names), -1, -1)
    )
    return _first_that_fits(candidates, fits)


def expanding_convolutions_that_fit(
    network: str, operations: NetworkOperations, fits: Fits, ratios: Sequence[float] = (1 / 2, 1 / 4, 1 / 8)
) -> UpdateScheme | None:
    """Updates some input channels of as many of the last expanding convolutions as fit.

    Expanding are the 1x1 convolutions with more outputs than inputs: the schemes of Lin et al. 2022 (section 3.3)
    consist of these almost only. The biases from the first of them on are updated too. More layers go before more
    channels: of the most layers that fit, the largest ratio that fits.

    Args:
        network: Name of the network.
        operations: Of the network.
        fits: Whether a scheme is within the budget.
        ratios: Update ratios to try, the same for all layers; of a layer with too few channels, one channel.
    """
    convolutions = operations.convolutions
    expanding = [index for index, convolution in enumerate(convolutions) if is_expanding(convolution)]

    def candidates() -> Iterator[UpdateScheme]:
        for first, ratio in itertools.product(expanding, ratios):
            layers = [convolutions[index] for index in expanding if index >= first]
            weights = {layer.name: max(ratio, 1 / layer.in_channels) for layer in layers}
            provenance = {"rule": f"expanding convolutions that fit, {ratio} of their input channels"}
            yield UpdateScheme(network, len(convolutions) - first, weights, provenance=provenance)
        yield classifier_only(network)

    return _first_that_fits(candidates(), fits)


def is_expanding(convolution: Convolution) -> bool:
    """Whether it is a 1x1 convolution with more outputs than inputs."""
    return convolution.kernel_size == (1, 1) and convolution.out_channels > convolution.in_channels


def _first_that_fits(candidates: Iterator[UpdateScheme], fits: Fits) -> UpdateScheme | None:
    return next((scheme for scheme in candidates if fits(scheme)), None)
