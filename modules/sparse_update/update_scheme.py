"""The update scheme: which biases and which input channels of which weights are updated."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from microtune.modules.atomic_files import write_json
from microtune.modules.networks.operations import Convolution
from microtune.modules.user_error import UserError

KEYS = ("network", "bias_depth", "weights", "channels", "provenance")


@dataclass(frozen=True)
class UpdateScheme:
    """What is updated in a network beside its classifier (Lin et al. 2022, section 2.2).

    Args:
        network: Name of the network that the scheme is for, such as ``"mobilenet_v2-w0.35"``.
        bias_depth: The biases of the last ``bias_depth`` convolutions are updated.
        weights: Update ratio in (0, 1] per layer: the fraction of the input channels of its weight that is updated,
            rounded down; of a depthwise layer, of its channels.
        channels: Fixes which input channels of a layer of ``weights``; then their number counts, not the ratio.
        provenance: How the scheme came about, as plain JSON values.

    Raises:
        UserError: A value is of the wrong type or out of its range, whatever the network. ``check`` tells whether
            the scheme fits a given network.

    Example::

        scheme = UpdateScheme("resnet18", bias_depth=4, weights={"layer4.1.conv1": 0.25})
        scheme.save("scheme.json")
        assert UpdateScheme.load("scheme.json") == scheme
    """

    network: str
    bias_depth: int
    weights: Mapping[str, float] = field(default_factory=dict)
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.network, str):
            raise UserError(f"network is {self.network!r}: give the network's name as a string")
        if not _is_integer(self.bias_depth) or self.bias_depth < 0:
            raise UserError(f"bias_depth is {self.bias_depth!r}: give the number of last biases, 0 or more")
        for name, expected in (("weights", Mapping), ("channels", Mapping), ("provenance", Mapping)):
            if not isinstance(getattr(self, name), expected):
                raise UserError(f"{name} is {getattr(self, name)!r}: give a mapping of names to values")
        try:
            json.dumps(dict(self.provenance), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"provenance holds what JSON does not know ({error}): give plain values") from error
        for layer, ratio in self.weights.items():
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
                raise UserError(f"update ratio of {layer} is {ratio!r}: give a number in (0, 1]")
        for layer, indexes in self.channels.items():
            _check_channels(layer, indexes)
            if layer not in self.weights:
                raise UserError(f"channels of {layer} are fixed, but it is not among the weights: add its update ratio")

    def updated_channels(self, convolution: Convolution) -> int:
        """Number of input channels of this convolution's weight that are updated; 0 if none is."""
        if convolution.name in self.channels:
            return len(self.channels[convolution.name])
        # the tolerance lets 0.7 of 10 channels be 7 although the product of floats is 6.999...
        return math.floor(convolution.in_channels * self.weights.get(convolution.name, 0) + 1e-9)

    def check(self, convolutions: Sequence[Convolution], network: str | None = None) -> None:
        """Raises ``UserError`` unless the scheme can be applied to a network with these convolutions.

        Args:
            convolutions: The network's, in forward order.
            network: The network's name; without it the scheme's is not compared.
        """
        if network is not None and network != self.network:
            raise UserError(
                f"the scheme is for {self.network}, but the network is {network}: take a scheme made for it"
            )
        if self.bias_depth > len(convolutions):
            raise UserError(
                f"bias_depth is {self.bias_depth}, but the network has no more than {len(convolutions)} convolutions"
            )
        index_of = {convolution.name: index for index, convolution in enumerate(convolutions)}
        for layer, ratio in self.weights.items():
            if layer not in index_of:
                last = ", ".join(convolution.name for convolution in convolutions[-3:])
                raise UserError(f"layer {layer} is no convolution of the network: its last ones are {last}")
            convolution = convolutions[index_of[layer]]
            depth = len(convolutions) - index_of[layer]
            if depth > self.bias_depth:
                raise UserError(
                    f"the weight of {layer} is updated, but the layer lies outside bias_depth {self.bias_depth}: "
                    f"give at least {depth}, or leave its weight out"
                )
            if self.updated_channels(convolution) == 0:
                raise UserError(
                    f"update ratio {ratio} of {layer} is none of its {convolution.in_channels} input channels: "
                    f"give at least {math.ceil(1e4 / convolution.in_channels) / 1e4:g}"
                )
            too_high = [index for index in self.channels.get(layer, ()) if index >= convolution.in_channels]
            if too_high:
                raise UserError(
                    f"channel {too_high[0]} of {layer} does not exist: "
                    f"its input channels are 0 to {convolution.in_channels - 1}"
                )

    def renamed(self, network: str, names: Mapping[str, str]) -> "UpdateScheme":
        """The same updates for a network whose layers have other names; a name without another stays."""
        weights = {names.get(layer, layer): ratio for layer, ratio in self.weights.items()}
        channels = {names.get(layer, layer): indexes for layer, indexes in self.channels.items()}
        return replace(self, network=network, weights=weights, channels=channels)

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain JSON values."""
        return {
            "network": self.network,
            "bias_depth": self.bias_depth,
            "weights": dict(self.weights),
            "channels": {layer: list(indexes) for layer, indexes in self.channels.items()},
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "UpdateScheme":
        """The scheme of plain JSON values, as ``to_dict`` gives them; ``channels`` and ``provenance`` may be absent."""
        if not isinstance(values, dict):
            raise UserError(f"an update scheme is a JSON object with the keys {', '.join(KEYS)}, not {values!r:.80}")
        if unknown := sorted(set(values) - set(KEYS)):
            raise UserError(f"unknown key {unknown[0]!r}: an update scheme has {', '.join(KEYS)}")
        if missing := [key for key in KEYS[:3] if key not in values]:
            raise UserError(f"key {missing[0]!r} is missing: an update scheme has {', '.join(KEYS)}")
        return cls(**values)

    def save(self, path: Path | str) -> None:
        """Writes the scheme as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "UpdateScheme":
        """Reads a scheme that ``save`` wrote.

        Raises:
            UserError: The file is missing, no JSON, or no update scheme; the message begins with its path.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls.from_dict(json.loads(text, object_pairs_hook=_without_duplicates))
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the update scheme: {error.strerror}: give a file such as "
                "evolve_update_scheme.py writes"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: this is a binary file, not an update scheme in JSON") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:  # also a number of too many digits, or too deeply nested
            raise UserError(f"{path}: not valid JSON, perhaps cut off: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if doubled := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"key {doubled[0]!r} stands there twice: keep one")
    return dict(pairs)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_channels(layer: str, indexes: Any) -> None:
    if isinstance(indexes, str) or not isinstance(indexes, Sequence) or not indexes:
        raise UserError(f"channels of {layer} are {indexes!r}: give a list of at least one channel index")
    for index in indexes:
        if not _is_integer(index) or index < 0:
            raise UserError(f"channel {index!r} of {layer} is no channel index: give an integer, 0 or more")
    if doubled := [index for index in indexes if list(indexes).count(index) > 1]:
        raise UserError(f"channel {doubled[0]} of {layer} stands there twice: keep one")
