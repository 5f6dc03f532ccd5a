"""A contribution table from one backward pass: what each bias depth and each channel would gain to first order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from microtune.modules.networks.operations import Convolution
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.sparse_update.channel_choice import highest_channels, to_be_chosen
from microtune.modules.sparse_update.channel_importance import ChannelImportance, Criterion
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError


def gradient_table(
    importance: ChannelImportance,
    convolutions: Sequence[Convolution],
    base_depth: int,
    channel_multiple: int = 1,
    most_options: int | None = None,
    also: Mapping[str, int] | None = None,
) -> ContributionTable:
    """What each bias depth and each number of channels of each layer would gain, by first-order prediction.

    Gains are decreases of the mean loss (nats) by one step of SGD, per unit of its learning rate, and no accuracy: for
    c channels of a layer the sum of its c highest ``loss_decrease``. To first order they add up over all that is
    updated, so that the best scheme of a budget is a knapsack. None of them is negative.

    Args:
        importance: Of the last ``base_depth`` convolutions, or more.
        convolutions: The network's, in forward order.
        base_depth: The deepest bias depth.
        channel_multiple: The numbers of channels are multiples of it, or the whole layer.
        most_options: Numbers of channels of each layer, evenly spread up to the whole; by default all there are.
        also: A further number of channels of some layers.

    Raises:
        UserError: ``base_depth`` is out of its range.

    Example::

        table = gradient_table(importance, operations.convolutions, base_depth=36, channel_multiple=4)
        problem = SearchProblem("mobilenet_v2-w0.35", PeakMemory(operations), table, 65536, "extra")
        scheme = with_channels(problem.scheme(proven_optimum(problem).genome), operations.convolutions, importance)
    """
    if not 1 <= base_depth <= len(convolutions):
        raise UserError(f"base_depth is {base_depth}: give 1 to {len(convolutions)}, the network's convolutions")
    rows, of_biases = [], 0.0
    for depth, convolution in enumerate(reversed(convolutions[-base_depth:]), 1):
        of_biases += importance.layers[convolution.name].bias_loss_decrease
        rows.append(Contribution("bias", depth, "", 0.0, of_biases, 0.0, 1))
    for convolution in convolutions[-base_depth:]:
        layer, in_channels = convolution.name, convolution.in_channels
        highest = importance.layers[layer].loss_decrease.sort(descending=True, stable=True).values.cumsum(0)
        counts = set(_channel_counts(in_channels, channel_multiple, most_options)) | {(also or {}).get(layer)} - {None}
        rows += [
            Contribution("weight", base_depth, layer, count / in_channels, float(highest[count - 1]), 0.0, 1)
            for count in sorted(counts)
        ]
    return ContributionTable(tuple(rows))


def _channel_counts(in_channels: int, multiple: int, most: int | None) -> list[int]:
    """Multiples below the whole layer and the whole, ascending; of more than ``most`` an even spread."""
    counts = [*range(multiple, in_channels, multiple), in_channels]
    most = min(most or len(counts), len(counts))
    return [counts[len(counts) * part // most - 1] for part in range(1, most + 1)]


def with_channels(
    scheme: UpdateScheme,
    convolutions: Sequence[Convolution],
    importance: ChannelImportance,
    criterion: Criterion = "loss_decrease",
) -> UpdateScheme:
    """The scheme with fixed channels, those of the highest scores, in every layer of which not all are updated.

    Example::

        with_channels(UpdateScheme("x", 1, {"last": 0.5}), operations.convolutions, importance).channels["last"]
    """
    chosen = to_be_chosen(scheme, convolutions)
    layers = {convolution.name: importance.layers[convolution.name] for convolution in chosen}
    scores = replace(importance, layers=layers).scores(criterion)
    channels = {one.name: highest_channels(scores[one.name], scheme.updated_channels(one)) for one in chosen}
    return replace(scheme, channels={**scheme.channels, **channels})
