"""The contribution table: how much accuracy each bias depth and each layer's update buys, as measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import PlainSerializer, model_validator

from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.networks.operations import Convolution
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

GO_ON = "measure_contributions goes on where it stopped"


@dataclass(frozen=True)
class Contribution:
    """One measured gain, a row of the table (Lin et al. 2022, section 2.2).

    In a file the ratio of a bias is empty, and the deviation of one run may be.

    Args:
        kind: ``"bias"``: what the last ``bias_depth`` biases gain over the classifier only; ``"weight"``: what the
            layer's weight at this update ratio gains over the last ``bias_depth`` biases only.
        bias_depth: The biases of this many last convolutions are updated; 0 or more, of a weight 1 or more.
        layer: Module path of the convolution; of a bias ``""``.
        ratio: Update ratio in (0, 1]; of a bias 0.
        gain: Mean accuracy gained, as a fraction: 0.012 is 1.2 points.
        gain_std: Standard deviation of the gain over the runs; 0 if it is not known.
        runs: Number of runs that the gain is the mean of.

    Raises:
        UserError: A value is out of its range.

    Example::

        Contribution("weight", 20, "features.16.conv.0.0", 0.25, gain=0.012, gain_std=0.003, runs=3)
    """

    kind: Literal["bias", "weight"]
    bias_depth: int
    layer: str
    ratio: Annotated[float, PlainSerializer(lambda ratio: float(ratio) or "")]
    gain: float
    gain_std: float
    runs: int

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, values: dict[str, str]) -> dict[str, str]:
        may_be_empty = {"ratio": values["kind"] == "bias", "gain_std": values["runs"] == "1"}
        return values | {name: "0" for name, may_be in may_be_empty.items() if may_be and values[name] == ""}

    def __post_init__(self):
        if self.kind == "bias" and (self.layer != "" or self.ratio != 0):
            raise UserError(f"a bias row has layer {self.layer!r} and ratio {self.ratio!r}: leave both empty")
        if self.kind == "weight" and self.layer == "":
            raise UserError("a weight row has no layer: give the convolution's name")
        if self.kind == "weight" and not 0 < self.ratio <= 1:
            raise UserError(f"ratio of {self.layer} is {self.ratio!r}: give a number in (0, 1]")
        lowest = 1 if self.kind == "weight" else 0
        if self.bias_depth < lowest:
            raise UserError(f"bias_depth of a {self.kind} row is {self.bias_depth!r}: give {lowest} or more")
        if not math.isfinite(self.gain):
            raise UserError(f"gain is {self.gain!r}: give a finite number")
        if self.kind == "bias" and self.bias_depth == 0 and self.gain != 0:
            raise UserError(
                f"gain of bias depth 0 is {self.gain!r}: that is the classifier only, which gains are counted from; "
                "give 0 or leave the row out"
            )
        if not math.isfinite(self.gain_std) or self.gain_std < 0:
            raise UserError(f"gain_std is {self.gain_std!r}: give a finite number, 0 or more")
        if self.runs < 1:
            raise UserError(f"runs is {self.runs!r}: give 1 or more")

    @property
    def standard_error(self) -> float:
        """Standard error of the gain: ``gain_std / sqrt(runs)``."""
        return self.gain_std / math.sqrt(self.runs)

    @property
    def key(self) -> tuple[str | int | float, ...]:
        """What no other row has."""
        return (self.kind, self.bias_depth) if self.kind == "bias" else (self.kind, self.layer, _rounded(self.ratio))


@dataclass(frozen=True)
class ContributionTable:
    """The gains that a search adds up to a scheme's score.

    A score is a proxy: gains that were measured one by one do not add up exactly.

    Args:
        rows: In any order; ``save`` and ``load`` keep it.

    Example::

        table = ContributionTable.load("contributions.csv")
        table.check(describe_network("mobilenet_v2-w0.35").operations.convolutions)
        table.bias_gains[20] + table.weight_gains["features.16.conv.0.0"][0.25]
    """

    rows: tuple[Contribution, ...]

    @property
    def base_depth(self) -> int:
        """Bias depth at which the weights were measured; without weight rows the deepest of the biases."""
        weights = [row.bias_depth for row in self.rows if row.kind == "weight"]
        return weights[0] if weights else max((row.bias_depth for row in self.rows), default=0)

    @cached_property
    def bias_gains(self) -> dict[int, float]:
        """Shrunk gain (see ``shrunk``) per measured bias depth; of depth 0, the classifier only, 0.0."""
        rows = [row for row in self.rows if row.kind == "bias" and row.bias_depth > 0]
        gains = shrunk([row.gain for row in rows], [row.standard_error for row in rows])
        return {0: 0.0} | {row.bias_depth: gain for row, gain in zip(rows, gains, strict=True)}

    @cached_property
    def weight_gains(self) -> dict[str, dict[float, float]]:
        """Shrunk gain (see ``shrunk``) per layer and update ratio."""
        rows = [row for row in self.rows if row.kind == "weight"]
        gains: dict[str, dict[float, float]] = {}
        for row, gain in zip(rows, shrunk([r.gain for r in rows], [r.standard_error for r in rows]), strict=True):
            gains.setdefault(row.layer, {})[row.ratio] = gain
        return gains

    def renamed(self, names: Mapping[str, str]) -> "ContributionTable":
        """The same gains for a network whose layers have other names; a name without another stays."""
        return ContributionTable(tuple(replace(row, layer=names.get(row.layer, row.layer)) for row in self.rows))

    def check(self, convolutions: Sequence[Convolution], layers: Sequence[str] = ()) -> None:
        """Raises ``UserError`` unless the table is of a network with these convolutions.

        Args:
            convolutions: The network's, in forward order.
            layers: Names of layers that the table must have weight rows of.
        """
        depth_of = {convolution.name: len(convolutions) - i for i, convolution in enumerate(convolutions)}
        by_name = {convolution.name: convolution for convolution in convolutions}
        for row in self.rows:
            if row.layer and row.layer not in by_name:
                last = ", ".join(convolution.name for convolution in convolutions[-3:])
                raise UserError(
                    f"layer {row.layer} of the contribution table is no convolution of the network, whose last ones "
                    f"are {last}: take a table measured on it"
                )
            if row.bias_depth > len(convolutions):
                raise UserError(
                    f"the contribution table has bias depth {row.bias_depth}, but the network has no more than "
                    f"{len(convolutions)} convolutions: take a table measured on it"
                )
            if row.layer:
                _check_weight(row, by_name[row.layer], depth_of[row.layer])
        if missing := [layer for layer in layers if layer not in self.weight_gains]:
            raise UserError(
                f"missing layers: the contribution table has no weight rows of {', '.join(missing)}: measure them, "
                f"{GO_ON}; or search without them with --allow_missing_layers"
            )

    def save(self, path: Path | str) -> None:
        """Writes the table as CSV; ``load`` gives an equal one."""
        write_rows(path, self.rows, Contribution)

    @classmethod
    def load(cls, path: Path | str) -> "ContributionTable":
        """Reads a table that ``save`` wrote, or one by hand; its columns may be in any order.

        Raises:
            UserError: The file is missing, no contribution table, or one that is not finished; the message begins
                with its path, and says the line where one line is wrong.
        """
        rows = read_rows(path, Contribution, _check_base_depth)
        try:
            _check_complete(rows)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return cls(tuple(rows))


def shrunk(gains: Sequence[float], standard_errors: Sequence[float]) -> list[float]:
    """The gains, each drawn towards 0 by as much as its noise says (empirical Bayes).

    A search that takes the highest of many noisy gains takes the luckiest; shrinking each gain makes up for it. If
    true gains scatter around 0 with variance tau^2 and are measured with standard errors se_i, then

        tau^2 = max(0, mean(gain_i^2 - se_i^2))
        shrunk gain_i = gain_i * tau^2 / (tau^2 + se_i^2)

    Source: Efron and Morris 1975, JASA 70, "Data analysis using Stein's estimator and its generalizations".

    Args:
        gains: Measured gains of one kind.
        standard_errors: Of each gain; one of 0 leaves its gain as it is.

    Example::

        shrunk([0.02, 0.01], [0.01, 0.0])  # [0.0133..., 0.01]
    """
    if not gains:
        return []
    variances = [error * error for error in standard_errors]
    pairs = list(zip(gains, variances, strict=True))
    between = max(0.0, math.fsum(gain * gain - variance for gain, variance in pairs) / len(pairs))
    return [gain * (between / (between + variance)) if variance > 0 else gain for gain, variance in pairs]


def _check_weight(row: Contribution, convolution: Convolution, depth: int) -> None:
    if depth > row.bias_depth:
        raise UserError(
            f"layer {row.layer} of the contribution table lies outside its base depth {row.bias_depth}: measure it "
            f"with a base depth of at least {depth}, or leave its rows out"
        )
    if UpdateScheme("", row.bias_depth, {row.layer: row.ratio}).updated_channels(convolution) == 0:
        raise UserError(
            f"ratio {row.ratio} of {row.layer} in the contribution table is none of its {convolution.in_channels} "
            f"input channels: give at least {math.ceil(1e4 / convolution.in_channels) / 1e4:g}"
        )


def _rounded(ratio: float) -> float:
    return round(ratio, 9)  # a third is the same ratio with nine digits as with all


def _check_base_depth(row: Contribution, others: Mapping[int, Contribution]) -> None:
    first = next((other for other in others.values() if other.kind == "weight"), row)
    if row.kind == "weight" and row.bias_depth != first.bias_depth:
        raise UserError(
            f"the weight of {row.layer} was measured with base depth {row.bias_depth}, those before with "
            f"{first.bias_depth}: gains of two base depths do not compare, measure all with one"
        )


def _check_complete(rows: Sequence[Contribution]) -> None:
    depths = {row.bias_depth for row in rows if row.kind == "bias"}
    if not depths:
        raise UserError(f"there are no bias rows: the measurement is not finished, {GO_ON}")
    ratios: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.kind == "weight":
            ratios.setdefault(row.layer, {})[_rounded(row.ratio)] = row.ratio
            if row.bias_depth not in depths:
                raise UserError(
                    f"base depth {row.bias_depth} of the weight rows has no bias row: the measurement is not "
                    f"finished, {GO_ON}"
                )
    every = {rounded: ratio for of_layer in ratios.values() for rounded, ratio in of_layer.items()}
    for layer, of_layer in ratios.items():
        if lacking := sorted(set(every) - set(of_layer)):
            raise UserError(
                f"layer {layer} lacks ratio {every[lacking[0]]}, which others have: the measurement is not finished, "
                f"{GO_ON}"
            )
