"""A data module by its name, with its samples as a network's weights expect them."""

import inspect
from pathlib import Path
from typing import Any

from microtune.datamodules.contract import ClassificationData
from microtune.datamodules.data_sets import find_data_set
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import normalization_of

# what recipes say themselves
DECIDED = ("self", "data_dir", "resolution", "normalization", "batch_size", "seed")


def data_module(
    name: str,
    data_dir: Path | str | None,
    weights: str,
    resolution: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any] | None = None,
) -> ClassificationData:
    """A data module with its samples normalised as the weights expect them, ready and set up.

    Args:
        name: Name of the data set, one of ``DATA_SETS``.
        data_dir: Folder of the data.
        weights: From ``source_of_weights``; images are normalised as theirs were, if they have as many channels.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        batch_size: Samples per step.
        seed: Seed of the order of the samples and of their augmentation.
        options: Further arguments of the data module, such as ``{"task": "words10"}``.

    Raises:
        UserError: The name or an option is unknown, or the data module refuses its arguments.

    Example::

        data_module("cifar10", "data", "none", resolution=96, batch_size=32, seed=0)
    """
    data_set = find_data_set(name)
    make = data_set.module_class()
    decided: dict[str, Any] = {"batch_size": batch_size, "seed": seed, **data_set.arguments}
    given = _known_options(make, name, options or {}, not_among={*DECIDED, *decided})
    if data_set.image_channels is not None:
        decided["resolution"] = resolution
        normalization = normalization_of(weights)
        if len(normalization[0]) in (1, data_set.image_channels):
            decided["normalization"] = normalization
    if data_set.is_in_folder:
        if data_dir is None:
            raise UserError(f"{name} lies in a folder: give it with --data_dir")
        decided["data_dir"] = data_dir
    data = make(**{**data_set.options, **given, **decided})
    data.prepare_data()
    data.setup()
    return data


def _known_options(make: type, name: str, options: dict[str, Any], not_among: set[str]) -> dict[str, Any]:
    known = [parameter for parameter in inspect.signature(make.__init__).parameters if parameter not in not_among]
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}: give one of {', '.join(known)}")
    return {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
