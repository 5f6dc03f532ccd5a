"""The bytes that a search's genomes take: what a scheme needs at every moment, as sums over its choices."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes, flash_bytes
from microtune.modules.sparse_update.update_scheme import UpdateScheme

Memory = Literal["peak", "extra"]
Floats, Integers = NDArray[np.float64], NDArray[np.int64]


class GenomeBytes:
    """Bytes of a problem's genomes at every moment: one column per moment, or a single one of extra memory.

    A choice is a layer with one of its ratios; the choices of all layers stand in one row, each layer's in ascending
    order, and the first of each layer updates nothing. All bytes are exact: whole numbers, or eighths of masks.

    Args:
        peak_memory: Of the network.
        memory: Which account.
        depths: The bias depths.
        layers: Index of each candidate layer among the convolutions.
        channels: Updated channels of every choice.
        layer_of: Of every choice, which candidate layer it is of.
        with_flash: Whether there is a last column, the flash of the frozen weights.
    """

    def __init__(
        self,
        peak_memory: PeakMemory,
        memory: Memory,
        depths: Sequence[int],
        layers: Integers,
        channels: Integers,
        layer_of: Integers,
        with_flash: bool,
    ):
        self.peak_memory, self.operations = peak_memory, peak_memory.operations
        self.depths, self.layers, self.channels, self.layer_of = depths, layers, channels, layer_of
        self.with_flash = with_flash
        self.first_updated = len(self.operations.convolutions) - np.array(depths)
        groups = peak_memory._layers_with_shared_input if memory == "peak" else []
        groups = [[layer for layer in group if layer in layers] for group in groups]
        self.shared_inputs = [group for group in groups if len(group) > 1]
        self._functions = [self._function(depth, memory) for depth in depths]
        self.constant, self.per_choice = self._tables()
        if self.is_linear:
            self._drop_columns()

    @property
    def is_linear(self) -> bool:
        """Whether the bytes of choices add up; they do not where candidate layers read the same activation."""
        return not self.shared_inputs

    def _function(self, depth: int, memory: Memory) -> tuple[Floats, Floats]:
        """Bytes as a constant and per updated channel, kept channel and whole input, with a column per moment."""
        convolutions, scheme = self.operations.convolutions, UpdateScheme("", depth)
        if memory == "extra":
            constant = np.array([extra_memory_bytes(convolutions, self.operations.classifier_features, scheme)])
            per_variable = np.zeros((3 * len(convolutions), 1))
            added = [math.prod(c.in_size) + c.weight_elements_per_channel for c in convolutions]
            per_variable[: len(convolutions), 0] = added
        else:
            constant, per_variable = self._peak_function(depth)
        if self.with_flash:
            constant = np.append(constant, flash_bytes(self.operations, scheme))
            freed = [-c.weight_elements_per_channel for c in convolutions] + [0] * (2 * len(convolutions))
            per_variable = np.column_stack([per_variable, np.array(freed, dtype=float)])
        return constant, per_variable

    @cached_property
    def _moments(self) -> dict[str, int]:
        """Column of every moment of the deepest depth, whose backward pass has those of all others."""
        return {name: index for index, name in enumerate(self.peak_memory.rows(self.depths[-1]).moments)}

    def _peak_function(self, depth: int) -> tuple[Floats, Floats]:
        rows = self.peak_memory.rows(depth)
        columns = [self._moments[name] for name in rows.moments]
        per_variable = np.concatenate([rows.per_updated_channel, rows.per_kept_channel, rows.kept_whole], axis=2)
        constant, aligned = np.zeros(len(self._moments)), np.zeros((per_variable.shape[2], len(self._moments)))
        constant[columns], aligned[:, columns] = rows.constant.sum(0), per_variable.sum(0).T
        return constant, aligned

    def _columns(self, depth: int, updated: Integers) -> Floats:
        """Bytes at one depth, of shape (scheme, column), of updated channels of shape (scheme, convolution)."""
        constant, per_variable = self._functions[depth]
        updated = np.where(np.arange(updated.shape[1]) >= self.first_updated[depth], updated, 0)
        variables = np.concatenate([updated, *self.peak_memory.kept_inputs(updated)], axis=1)
        return variables.astype(np.float64) @ per_variable + constant

    def _tables(self) -> tuple[Floats, Floats]:
        """Bytes of every depth without weights, and what each choice alone adds to them."""
        alone = np.zeros((len(self.channels) + 1, len(self.operations.convolutions)), dtype=np.int64)
        alone[np.arange(len(self.channels)), self.layers[self.layer_of]] = self.channels
        columns = np.stack([self._columns(depth, alone) for depth in range(len(self.depths))])
        return columns[:, -1], columns[:, :-1] - columns[:, -1:]

    def _drop_columns(self) -> None:
        """Leaves out moments at which, whatever is chosen, no more bytes are alive than at another one."""
        moments = self.constant.shape[1] - self.with_flash
        first_choices = np.flatnonzero(np.diff(self.layer_of, prepend=-1))
        # between a layer's fewest and its most channels below the whole, bytes are linear: those two are the extremes
        last_choices = np.append(first_choices, len(self.layer_of))[1:] - 1
        second, last_but_one = np.minimum(first_choices + 1, last_choices), np.maximum(last_choices - 1, first_choices)
        extremes = self.per_choice[:, np.stack([first_choices, second, last_but_one, last_choices], axis=1)]
        keep = np.ones(self.constant.shape[1], dtype=bool)
        for moment in range(moments):
            others = np.flatnonzero(keep[:moments])
            others = others[others != moment]
            more = self.constant[:, [moment]] - self.constant[:, others]
            if len(first_choices):
                per_choice = extremes[..., [moment]] - extremes[..., others]
                more = more + per_choice.max(axis=2).sum(axis=1)
            keep[moment] = not (more <= 0).all(axis=0).any()
        self.constant, self.per_choice = self.constant[:, keep].copy(), self.per_choice[:, :, keep].copy()

    def after_each(self, depth: int, choices: Integers) -> Floats:
        """Bytes after each single move: first to each depth, then to each choice of a layer; (move, column)."""
        if self.is_linear:
            at_depths = self.constant + self.per_choice[:, choices].sum(axis=1)
            per_choice = self.per_choice[depth]
            return np.concatenate([at_depths, per_choice + (at_depths[depth] - per_choice[choices])[self.layer_of]])
        changed = np.repeat(choices[None], len(self.channels), axis=0)
        changed[np.arange(len(self.channels)), self.layer_of] = np.arange(len(self.channels))
        at_depths = [self._columns(index, self._updated(choices[None])) for index in range(len(self.depths))]
        return np.concatenate([*at_depths, self._columns(depth, self._updated(changed))])

    def bytes(self, depth: int, choices: Integers) -> Floats:
        """Bytes of each column."""
        if self.is_linear:
            return self.constant[depth] + self.per_choice[depth, choices].sum(axis=0)
        return self._columns(depth, self._updated(choices[None]))[0]

    def _updated(self, choices: Integers) -> Integers:
        updated = np.zeros((len(choices), len(self.operations.convolutions)), dtype=np.int64)
        updated[:, self.layers] = self.channels[choices]
        return updated
