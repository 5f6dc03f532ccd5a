"""The search for an update scheme: which one within a budget has the highest score by a contribution table."""

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.operations import Convolution
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.genome_bytes import GenomeBytes, Memory
from microtune.modules.search.integer_program import Genome, IntegerProgram, best_genome
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

Floats, Integers, Bools = NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]
FREE = 1e-12  # the price of what adds no byte


class SearchProblem:
    """Which scheme within a budget has the highest score by a contribution table.

    A *part* of a genome is its depth or one of its candidate layers; the *options* of all parts stand in one row: first
    the depths, then the ratios of each layer. So a genome is one option per part, and a move is to another option.

    Args:
        network: Its name, as in ``UpdateScheme``.
        peak_memory: Of the network, with the options of the training.
        table: Measured contributions: their bias depths, layers and ratios are what can be chosen.
        budget_bytes: What the scheme may take, in MCU bytes.
        memory: Whether the budget is for the peak of a training step or for the paper's extra memory.
        flash_limit_bytes: What the frozen weights may take, in MCU bytes; counts with ``memory="peak"`` only.
        fix_channels: Fixes the channels of every scheme that ``scheme`` gives, as many as its ratios say, such as
            ``with_channels``; without it schemes leave open which.

    Raises:
        UserError: The table does not fit the network, or no scheme fits the budget: says what would do.

    Example::

        problem = SearchProblem("mobilenet_v2-w0.35", PeakMemory(operations), table, budget_bytes=294912)
        genome = problem.repair(problem.random_genome(random.Random(0)))
        problem.scheme(genome).save("scheme.json")
    """

    def __init__(
        self,
        network: str,
        peak_memory: PeakMemory,
        table: ContributionTable,
        budget_bytes: float,
        memory: Memory = "peak",
        flash_limit_bytes: int | None = None,
        fix_channels: Callable[[UpdateScheme], UpdateScheme] | None = None,
    ):
        if memory not in get_args(Memory):
            raise UserError(f"memory is {memory!r}: give one of {', '.join(get_args(Memory))}")
        self.network, self.peak_memory, self.memory = network, peak_memory, memory
        self.budget_bytes, self.fix_channels = budget_bytes, fix_channels
        self.flash_limit_bytes = flash_limit_bytes if memory == "peak" else None
        if self.flash_limit_bytes is not None and self.flash_limit_bytes <= 0:
            raise UserError(f"flash_limit_bytes is {flash_limit_bytes}: give a positive number of bytes")
        convolutions = peak_memory.operations.convolutions
        table.check(convolutions)
        index_of = {convolution.name: index for index, convolution in enumerate(convolutions)}
        self.depths = tuple(sorted(table.bias_gains))
        self.layers = tuple(sorted(table.weight_gains, key=index_of.__getitem__))
        self.ratios = tuple((0.0, *sorted(table.weight_gains[layer])) for layer in self.layers)
        if self.layers and len(convolutions) - index_of[self.layers[0]] > self.depths[-1]:
            raise UserError(
                f"layer {self.layers[0]} of the contribution table lies outside its deepest bias row, "
                f"{self.depths[-1]}: measure bias depth {table.base_depth} too"
            )
        self._convolutions: list[Convolution] = [convolutions[index_of[layer]] for layer in self.layers]
        self._lay_out_options(table)
        self._lay_out_bytes(np.array([index_of[layer] for layer in self.layers], dtype=np.int64))
        self._start = self._first_that_fits()

    def _lay_out_options(self, table: ContributionTable) -> None:
        """Numbers the options of all parts."""
        counts = [len(self.depths), *(len(ratios) for ratios in self.ratios)]
        self.first_option = np.cumsum([0, *counts[:-1]])
        self.part_of = np.repeat(np.arange(len(counts)), counts)
        self._options = np.arange(len(self.part_of))
        self._gains_of_parts = [[table.bias_gains[depth] for depth in self.depths]]
        for layer, ratios in zip(self.layers, self.ratios, strict=True):
            self._gains_of_parts.append([0.0, *(table.weight_gains[layer][ratio] for ratio in ratios[1:])])
        self.gains = np.array([gain for gains in self._gains_of_parts for gain in gains])
        channels = [
            UpdateScheme("", 0, {convolution.name: ratio} if ratio else {}).updated_channels(convolution)
            for convolution, ratios in zip(self._convolutions, self.ratios, strict=True)
            for ratio in ratios
        ]
        self._channels = np.array([0] * len(self.depths) + channels, dtype=np.int64)

    def _lay_out_bytes(self, layer_indexes: Integers) -> None:
        """Writes the bytes of all options into arrays, and which layers lie within which depths."""
        depths, with_flash = len(self.depths), self.flash_limit_bytes is not None
        self.account = GenomeBytes(
            self.peak_memory,
            self.memory,
            self.depths,
            layer_indexes,
            self._channels[depths:],
            self.part_of[depths:] - 1,
            with_flash,
        )
        self._set_limits()
        # a layer lies within all depths from one on
        self._first_depth = [int((self.account.first_updated > index).sum()) for index in layer_indexes.tolist()]
        parts_within = np.arange(depths)[:, None] >= np.array([0, *self._first_depth])
        self._parts_outside = (~parts_within).astype(float)
        self.is_within = parts_within[:, self.part_of]

    def _set_limits(self) -> None:
        """What each moment may take, and the frozen weights."""
        self.limits = np.full(self.account.constant.shape[1], float(self.budget_bytes))
        if self.flash_limit_bytes is not None:
            self.limits[-1] = self.flash_limit_bytes

    def within(self, budget_bytes: float) -> "SearchProblem":
        """The same problem within another budget: the same genomes stand for the same schemes.

        Raises:
            UserError: No scheme fits it.
        """
        other = copy.copy(self)
        other.budget_bytes = budget_bytes
        other._set_limits()
        other._start = other._first_that_fits()
        return other

    def random_genome(self, rng: random.Random) -> Genome:
        """One at random, which may be over the budget: any depth, and any ratio of each layer within it."""
        depth = rng.randrange(len(self.depths))
        return self.canonical((depth, *(rng.randrange(len(ratios)) for ratios in self.ratios)))

    def canonical(self, genome: Genome) -> Genome:
        """The genome without the layers outside its bias depth."""
        depth, *ratios = genome
        return (depth, *(r if first <= depth else 0 for r, first in zip(ratios, self._first_depth, strict=True)))

    def memory_bytes(self, genome: Genome) -> float:
        """What the genome's scheme takes, as ``extra_memory_bytes`` or ``PeakMemory.peak_bytes`` says."""
        columns = self._bytes(genome)
        return float(columns[: len(columns) - (self.flash_limit_bytes is not None)].max())

    def fits(self, genome: Genome) -> bool:
        """Whether the genome's scheme is within the budget, and its frozen weights within the flash."""
        return bool((self._bytes(genome) <= self.limits).all())

    def score(self, genome: Genome) -> float:
        """Sum of the gains of the genome's depth and of its layers within it, in the unit of the table."""
        return float(sum(self.gains_of(genome)))

    def gains_of(self, genome: Genome) -> list[float]:
        """The gain of the genome's depth, and of each of the candidate layers; 0 of those outside the depth."""
        pairs = zip(self._gains_of_parts, self.canonical(genome), strict=True)
        return [gains[option] for gains, option in pairs]

    def repair(
        self, genome: Genome, rng: random.Random | None = None, noise: float = 0.0, left_out: float = 0.0
    ) -> Genome:
        """Makes a genome fit at the least loss of gain per byte, then fills what is left by gain per byte.

        Bytes are counted where they matter: freed ones as far as a moment is over the budget, added ones by the largest
        part that they take of what a moment has left. Only positive gains are added.

        Args:
            genome: Any.
            rng: Needed with noise or left_out.
            noise: Each gain is multiplied by exp(noise x a normal draw), anew in each call, so that different fillings
                come out; the scores stay as they are.
            left_out: Part of the options that are not filled in, others in each call, so that genomes come out that
                leave memory unused.
        """
        weights = np.ones(len(self.gains))
        if noise:
            weights = np.exp(noise * np.array([rng.gauss(0, 1) for _ in weights]))
        is_free = np.ones(len(self.gains), dtype=bool)
        if left_out:
            is_free = np.array([rng.random() >= left_out for _ in is_free])
        return self._repaired(self.canonical(genome), weights, is_free)

    def blind_repair(self, genome: Genome, rng: random.Random) -> Genome:
        """Throws out weights in random order, then biases, until the genome fits; the gains play no part."""
        changed = list(self.canonical(genome))
        updated = [part for part in range(1, len(changed)) if changed[part]]
        rng.shuffle(updated)
        while not self.fits(tuple(changed)):
            if updated:
                changed[updated.pop()] = 0
            elif changed[0] > 0:
                changed[0] -= 1
            else:  # only where the flash asks for updates
                return self._start
        return tuple(changed)

    def neighbours(self, genome: Genome) -> list[Genome]:
        """The distinct genomes one move away, without the genome itself.

        A move takes one layer to another ratio, the depth to the next on either side, or lowers one layer and raises
        another by a step each. The rest is repaired around it.
        """
        genome = self.canonical(genome)
        moves = [{0: depth} for depth in (genome[0] - 1, genome[0] + 1) if 0 <= depth < len(self.depths)]
        within = [part for part, first in enumerate(self._first_depth, 1) if first <= genome[0]]
        for part in within:
            moves += [{part: ratio} for ratio in range(len(self.ratios[part - 1])) if ratio != genome[part]]
        for lowered, raised in itertools.permutations(within, 2):
            if genome[lowered] > 0 and genome[raised] + 1 < len(self.ratios[raised - 1]):
                moves.append({lowered: genome[lowered] - 1, raised: genome[raised] + 1})
        found = dict.fromkeys(self._repaired_around(genome, move) for move in moves)
        return [one for one in found if one != genome]

    def from_the_back(self, option: int) -> Genome:
        """As many of the last candidate layers as fit, each with its ratio number ``option``: the rule of thumb.

        The biases from the first of these layers on are updated, and nothing else is filled.

        Args:
            option: Of the ratios in ascending order, 0 being none; a layer with fewer takes its highest.
        """
        for first in range(len(self.layers) + 1):
            ratios = [min(option, len(known) - 1) for known in self.ratios[first:]]
            depth = max(self._first_depth[first:], default=0) if option else 0
            genome = (depth, *[0] * first, *ratios)
            if self.fits(genome):
                return genome
        return self._start

    def scheme(self, genome: Genome, provenance: dict[str, Any] | None = None) -> UpdateScheme:
        """The genome as an update scheme.

        Args:
            genome: Any.
            provenance: How it came about, as plain JSON values.
        """
        depth, *options = self.canonical(genome)
        rows = zip(self.layers, self.ratios, options, strict=True)
        weights = {layer: ratios[option] for layer, ratios, option in rows if option}
        scheme = UpdateScheme(self.network, self.depths[depth], weights, provenance=provenance or {})
        return self.fix_channels(scheme) if self.fix_channels else scheme

    def genome_of(self, scheme: UpdateScheme) -> Genome:
        """The genome nearest to a scheme, repaired.

        Layers that the table lacks are left out, others take the next lower ratio, and the depth is the nearest that
        holds them.

        Raises:
            UserError: The scheme is not for this network.
        """
        scheme.check(self.peak_memory.operations.convolutions, self.network)
        ratios = []
        for part, convolution in enumerate(self._convolutions, 1):
            known = self._channels[self.part_of == part]
            ratios.append(int(np.searchsorted(known, scheme.updated_channels(convolution), side="right")) - 1)
        needed = max((first for first, ratio in zip(self._first_depth, ratios, strict=True) if ratio), default=0)
        depths = range(needed, len(self.depths))
        depth = min(depths, key=lambda index: abs(self.depths[index] - scheme.bias_depth))
        return self.repair((depth, *ratios))

    def integer_program(self) -> IntegerProgram:
        """The problem as a mixed-integer program; its bytes must add up (``account.is_linear``)."""
        return IntegerProgram(
            self.gains, self.part_of, self.first_option, self.is_within, self.limits, self.account.constant,
            self.account.per_choice, may_cost_accuracy=self.flash_limit_bytes is not None,
        )  # fmt: skip

    def _bytes(self, genome: Genome) -> Floats:
        options = self.first_option + np.array(self.canonical(genome))
        return self.account.bytes(*self._depth_and_choices(options))

    def _depth_and_choices(self, options: Integers) -> tuple[int, Integers]:
        return int(options[0]), options[1:] - len(self.depths)

    def _repaired_around(self, genome: Genome, move: dict[int, int]) -> Genome:
        """Makes a move and repairs the rest; the moved parts stay as they are, unless nothing else would fit."""
        moved = self.canonical(tuple(move.get(part, option) for part, option in enumerate(genome)))
        is_free = ~np.isin(self.part_of, list(move))
        for part, option in move.items():
            if part and option:  # a lower depth would leave the layer out
                is_free[: self._first_depth[part - 1]] = False
        return self._repaired(moved, np.ones(len(self.gains)), is_free)

    def _repaired(self, genome: Genome, weights: Floats, is_free: Bools) -> Genome:
        """Repairs a canonical genome.

        Args:
            genome: What to repair.
            weights: What the gain of each option is multiplied by.
            is_free: Options that may be moved to.
        """
        options = self._reduced(self.first_option + np.array(genome), weights, is_free)
        if options is None:
            options = self.first_option + np.array(self._start)
        return tuple((self._filled(options, weights, is_free) - self.first_option).tolist())

    def _reduced(self, options: Integers, weights: Floats, is_free: Bools) -> Integers | None:
        """Lowers what loses least gain per excess byte freed until all fits; None where no move frees any.

        Where the frozen weights exceed the flash, updating more is a move as well.
        """
        while True:
            depth = int(options[0])
            after = self.account.after_each(*self._depth_and_choices(options))
            # a sum of fractions of the limits; 0 only of what fits
            excess = (np.maximum(after - self.limits, 0) / self.limits).sum(axis=1)
            if excess[depth] == 0:
                return options
            freed = excess[depth] - excess
            allowed = self._options < options[self.part_of]
            if self.flash_limit_bytes is not None and after[depth, -1] > self.limits[-1]:
                allowed = self.is_within[depth]
            allowed = allowed & (freed > 0)
            if not allowed.any():
                return None
            if (allowed & is_free).any():
                allowed &= is_free
            lost = (self.gains[options][self.part_of] - self.gains) * weights[options][self.part_of]
            lost[: len(self.depths)] += self._parts_outside @ (self.gains * weights)[options]
            options = self._moved(options, int(np.where(allowed, lost / np.where(allowed, freed, 1), np.inf).argmin()))

    def _filled(self, options: Integers, weights: Floats, is_free: Bools) -> Integers:
        """Adds what fits with the highest gain per byte until nothing with a positive gain does."""
        while True:
            depth = int(options[0])
            added_gain = self.gains - self.gains[options][self.part_of]
            allowed = (self._options > options[self.part_of]) & self.is_within[depth] & (added_gain > 0) & is_free
            if not allowed.any():
                return options
            after = self.account.after_each(*self._depth_and_choices(options))
            moves = np.flatnonzero(allowed & (after <= self.limits).all(axis=1))
            if not len(moves):
                return options
            present = after[depth]
            left = self.limits - present
            # where nothing is left, what fits adds nothing
            price = ((after[moves] - present) / np.where(left > 0, left, 1)).max(axis=1)
            value = added_gain[moves] * weights[moves] / np.maximum(price, FREE)
            options = self._moved(options, int(moves[value.argmax()]))

    def _moved(self, options: Integers, option: int) -> Integers:
        """Takes one part to another option, and layers outside the depth to none."""
        options = options.copy()
        options[self.part_of[option]] = option
        return np.where(self._parts_outside[options[0]], self.first_option, options)

    def _first_that_fits(self) -> Genome:
        """Updates nothing but the classifier, unless the flash asks for more.

        Raises:
            UserError: No scheme needs as little.
        """
        nothing = (0,) * (1 + len(self.layers))
        floor = self.memory_bytes(nothing)
        if not floor <= self.budget_bytes:
            raise UserError(
                f"budget_bytes is {self.budget_bytes} of {self.memory} memory, but the smallest scheme, the classifier "
                f"only, needs {floor / 1024:.1f} KiB: give at least {floor:.12g} bytes"
            )
        if self.fits(nothing):
            return nothing
        if (found := self._first_within_flash()) is not None:
            return found
        most = (len(self.depths) - 1, *(len(ratios) - 1 for ratios in self.ratios))
        frozen, least = self._bytes(nothing)[-1], self._bytes(most)[-1]
        raise UserError(
            f"flash_limit_bytes is {self.flash_limit_bytes}, but the frozen weights need {frozen:.0f} bytes "
            f"({frozen / 1024:.1f} KiB), {least:.0f} if all of the table is updated, and no scheme was found "
            f"within both this and budget_bytes {self.budget_bytes}: take more flash or a narrower network"
        )

    def _first_within_flash(self) -> Genome | None:
        """A genome that updates enough for the frozen weights to fit the flash; None if there is none."""
        for depth in range(len(self.depths)):
            start = self.first_option + np.array((depth, *(0,) * len(self.layers)))
            found = self._reduced(start, np.ones(len(self.gains)), np.ones(len(self.gains), dtype=bool))
            if found is not None:
                return tuple((found - self.first_option).tolist())
        return best_genome(self.integer_program()) if self.account.is_linear else None
