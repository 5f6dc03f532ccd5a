"""Which input channels of a layer's weight are updated, where the scheme only says how many."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from microtune.modules.networks.operations import Convolution
from microtune.modules.sparse_update.channel_importance import (
    WITHOUT_DATA,
    ChannelImportance,
    Criterion,
    random_scores,
    weight_norm_scores,
)
from microtune.modules.sparse_update.subtensor import SubTensorConv2d
from microtune.modules.sparse_update.update_scheme import UpdateScheme


def highest_channels(scores: Tensor, count: int) -> list[int]:
    """The ``count`` channels with the highest scores, sorted; of equal scores the first win.

    Example::

        highest_channels(torch.tensor([0.5, 2.0, 1.0]), 2)  # [1, 2]
    """
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


def choose_channels(
    network: nn.Module,
    scheme: UpdateScheme,
    convolutions: Sequence[Convolution],
    choice: Criterion = "weight_norm",
    seed: int = 0,
    importance: ChannelImportance | None = None,
) -> dict[str, list[int]]:
    """The updated input channels of every layer of ``scheme.weights``: those that it fixes, else the highest scores.

    Args:
        network: Whose weights ``weight_norm`` reads.
        scheme: How many of which layers.
        convolutions: The network's.
        choice: By which score.
        seed: Of ``random``.
        importance: Measured on the layers that ``to_be_chosen`` names; needed where the choice is by data.

    Example::

        choose_channels(network, scheme, find_operations(network, (3, 96, 96)).convolutions, "random", seed=1)
    """
    fixed = {layer: sorted(indexes) for layer, indexes in scheme.channels.items()}
    measured = None if choice in WITHOUT_DATA else importance.scores(choice)
    chosen = {}
    for convolution in convolutions:
        name, count = convolution.name, scheme.updated_channels(convolution)
        if name in fixed:
            chosen[name] = fixed[name]
        elif count == convolution.in_channels:
            chosen[name] = list(range(count))
        elif count:
            chosen[name] = highest_channels(_scores(network, convolution, choice, seed, measured), count)
    return chosen


def is_due(step: int, chosen_at_step: int | None, rechoose_every: int) -> bool:
    """Whether channels are to be chosen before an optimizer step: for the first time, or anew.

    Args:
        step: How many steps the optimizers have taken.
        chosen_at_step: How many they had taken when channels were chosen last; None if they never were.
        rechoose_every: Steps from one choice to the next; 0 if the first one stays.

    Example::

        is_due(200, chosen_at_step=100, rechoose_every=100)  # True, and until the choice is made
    """
    if chosen_at_step is None:
        return True
    # not the remainder: several optimizers may step over a multiple
    return rechoose_every > 0 and step // rechoose_every > chosen_at_step // rechoose_every


def seed_at_step(seed: int, step: int) -> int:
    """Seed of a random choice that is made before an optimizer step; before the first one it is ``seed`` itself."""
    return seed if step == 0 else seed * 1_000_003 + step


def to_be_chosen(scheme: UpdateScheme, convolutions: Sequence[Convolution]) -> list[Convolution]:
    """The convolutions of which some channels, but not all, are updated and the scheme does not fix which."""
    return [
        convolution
        for convolution in convolutions
        if convolution.name not in scheme.channels
        and 0 < scheme.updated_channels(convolution) < convolution.in_channels
    ]


def _scores(
    network: nn.Module, convolution: Convolution, choice: Criterion, seed: int, measured: Mapping[str, Tensor] | None
) -> Tensor:
    if measured is not None:
        return measured[convolution.name]
    if choice == "random":
        return random_scores(convolution.name, convolution.in_channels, seed)
    module = network.get_submodule(convolution.name)
    if isinstance(module, SubTensorConv2d):
        module.write_slice()  # what training has made of it since the last forward pass
    return weight_norm_scores(module.weight, convolution.groups)
