"""The update scheme of a way to train, within a budget: from a file, by a rule, at random, or searched for."""

import functools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS, Fit, Microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes, extra_memory_per_layer
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.sparse_update.channel_choice import to_be_chosen
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.simple_schemes import (
    biases_that_fit,
    classifier_only,
    expanding_convolutions_that_fit,
    full_update,
    is_expanding,
    last_layers_that_fit,
)
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.table_search import load_table, make_problem
from microtune.recipes.studies.result_rows import memory_and_kib
from microtune.recipes.studies.ways import RULES, SEARCHES, Way
from microtune.recipes.training.memory_figures import KIB, fit_of, refuse_oversize
from microtune.recipes.training.networks import DescribedNetwork

log = logging.getLogger(__name__)

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of random schemes, where no table says which
SEARCH_SEED = 1000  # not among those that are reported
REMEDY = "give another scheme or budget"


def budget_by_name(name: str) -> Budget | None:
    """A budget as rows of results name it; None of ``"none"``.

    Raises:
        UserError: There is no such budget.

    Example::

        str(budget_by_name("extra64"))  # "64.0 KiB of extra memory"
    """
    memory, kib = memory_and_kib(name)
    if kib is None:
        return None
    size_bytes = round(kib * KIB)
    if memory == "extra":
        return Budget(memory, size_bytes)
    own = Microcontroller(name, size_bytes, flash_bytes=None, reserve_bytes=0, source="the command line")
    return Budget(memory, size_bytes, MICROCONTROLLERS.get(name, own))


@dataclass(frozen=True)
class WaysOfOneScheme:
    """Ways that share where their scheme comes from, and so the scheme: it has to fit for all of them.

    Args:
        described: The network.
        budget: What a training step may take; None for anything.
        ways: By name.
    """

    described: DescribedNetwork
    budget: Budget | None
    ways: dict[str, Way]

    @property
    def source(self) -> Way:
        """Where the scheme comes from."""
        return next(iter(self.ways.values())).source

    def fits(self, scheme: UpdateScheme) -> bool:
        """Whether training in each of the ways is within the budget, and the frozen weights within the flash."""
        if self.budget is None:
            return True
        if self.budget.memory == "extra":
            return extra_bytes(self.described, scheme) <= self.budget.size_bytes
        return all(
            step_fit(self.described, scheme, way, self.budget.microcontroller).fits for way in self.ways.values()
        )

    def checked(self, scheme: UpdateScheme) -> UpdateScheme:
        """The scheme; raises ``UserError`` if it does not fit, or leaves nothing to choose to a way that chooses."""
        described, budget = self.described, self.budget
        for name, way in self.ways.items():
            # what a search finds may be whole layers
            is_open = self.source.scheme in SEARCHES or to_be_chosen(scheme, described.operations.convolutions)
            if way.rechoose_every and not is_open:
                raise UserError(
                    f"way {name} chooses channels every {way.rechoose_every} steps, but its scheme leaves none to "
                    f"choose: {REMEDY}"
                )
            if budget is not None and budget.memory == "extra" and not self.fits(scheme):
                raise UserError(self._oversize(name, scheme))
            if budget is not None and budget.memory == "peak":
                peak_memory, device = peak_memory_of(described, way), budget.microcontroller
                try:
                    refuse_oversize(peak_memory, scheme, device, described.network, REMEDY, rechosen_by(way))
                except UserError as error:
                    raise UserError(f"scheme {name}: {error}") from error
        return scheme

    def _oversize(self, name: str, scheme: UpdateScheme) -> str:
        layers = extra_memory_per_layer(self.described.operations.convolutions, scheme)
        layers = [layer for layer in sorted(layers, key=lambda layer: -layer.total_bytes)[:3] if layer.total_bytes]
        costly = ", ".join(f"{layer.name} ({layer.total_bytes / KIB:.1f} KiB)" for layer in layers)
        least_bytes = extra_bytes(self.described, classifier_only(self.described.name))
        return (
            f"scheme {name} needs {extra_bytes(self.described, scheme) / KIB:.1f} KiB of extra memory, but the budget "
            f"is {self.budget.size_bytes / KIB:.1f} KiB; the smallest scheme, the classifier only, needs "
            f"{least_bytes / KIB:.1f} KiB{f'; most of it goes to {costly}' if costly else ''}: {REMEDY}"
        )


def rechosen_by(way: Way) -> Criterion | None:
    """The score by which a device chooses channels anew in training, if it does."""
    return way.criterion if way.rechoose_every else None


def peak_memory_of(described: DescribedNetwork, way: Way) -> PeakMemory:
    """Of a training step in this way; copies of an int8 network's weights take room."""
    is_latent = described.is_quantized and way.weight_storage == "latent"
    return PeakMemory(described.operations, latent_weights=is_latent)


def step_fit(
    described: DescribedNetwork, scheme: UpdateScheme, way: Way, device: Microcontroller = MICROCONTROLLERS["stm32f746"]
) -> Fit:
    """What a training step takes, with what choosing channels anew needs, beside what the microcontroller has."""
    return fit_of(peak_memory_of(described, way), scheme, device, rechosen_by(way))


def extra_bytes(described: DescribedNetwork, scheme: UpdateScheme) -> float:
    """The paper's figure."""
    operations = described.operations
    return extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)


def schemes_without_search(ways: WaysOfOneScheme, contributions: Path | None, seeds: int) -> list[UpdateScheme]:
    """The scheme for each seed, where it is not searched for.

    Args:
        ways: What it is for.
        contributions: Table whose layers, ratios and bias depths random schemes are drawn from; by default all
            expanding convolutions and all bias depths.
        seeds: How many.

    Raises:
        UserError: It does not fit the budget, or fills one where there is none.
    """
    source, described = ways.source, ways.described
    if source.scheme in RULES and ways.budget is None:
        raise UserError(f"{source.scheme} fills a budget: give one with --budgets, such as extra64 or stm32f746")
    if source.scheme == "random":
        return [ways.checked(scheme) for scheme in random_schemes(described, ways.budget, contributions, seeds)]
    if source.scheme == "full":
        scheme = full_update(described.name, described.operations)
    elif source.scheme == "classifier":
        scheme = classifier_only(described.name)
    elif source.scheme in RULES:
        scheme = scheme_by_rule(source, described, ways.fits)
    else:
        scheme = described.load_scheme(source.scheme)
    return [ways.checked(scheme)] * seeds


def scheme_by_rule(source: Way, described: DescribedNetwork, fits: Callable[[UpdateScheme], bool]) -> UpdateScheme:
    """The largest scheme by a rule that fits; the classifier only, where none does."""
    rules: dict[str, Callable[..., UpdateScheme | None]] = {
        "last_layers": last_layers_that_fit,
        "biases": biases_that_fit,
        "expanding": functools.partial(expanding_convolutions_that_fit, ratios=(source.ratio,)),
    }

    def is_suited(scheme: UpdateScheme) -> bool:
        return (source.deepest is None or scheme.bias_depth <= source.deepest) and fits(scheme)

    found = rules[source.scheme](described.name, described.operations, is_suited)
    return found or classifier_only(described.name)


def random_schemes(
    described: DescribedNetwork, budget: Budget, contributions: Path | None, seeds: int
) -> list[UpdateScheme]:
    """A scheme for each seed, drawn at random, of which updates are thrown out at random until it fits."""
    table = table_without_gains(described) if contributions is None else load_table(contributions, described)
    problem = make_problem(described, table, budget)
    found = []
    for seed in range(seeds):
        rng = random.Random(seed)
        genome = problem.blind_repair(problem.random_genome(rng), rng)
        found.append(problem.scheme(genome, {"rule": "random scheme that fits", "seed": seed}))
    return found


def table_without_gains(described: DescribedNetwork) -> ContributionTable:
    """All bias depths, and all expanding convolutions at some ratios: what there is to draw from."""
    convolutions = described.operations.convolutions
    deepest, nothing = len(convolutions), {"gain": 0.0, "gain_std": 0.0, "runs": 1}
    rows = [Contribution("bias", depth, "", 0.0, **nothing) for depth in range(1, deepest + 1)]
    for layer in filter(is_expanding, convolutions):
        ratios = [ratio for ratio in RATIOS if ratio * layer.in_channels >= 1]
        rows += [Contribution("weight", deepest, layer.name, ratio, **nothing) for ratio in ratios]
    return ContributionTable(tuple(rows))


def search_name(source: Way) -> str:
    """What tells a search apart from others for the same data and budget."""
    parts = [source.scheme, source.level, f"multiple{source.channel_multiple}"]
    return "-".join(parts + ([f"{source.evaluations}trials"] if source.scheme == "accuracy" else []))


def found_scheme(ways: WaysOfOneScheme, file: Path) -> UpdateScheme:
    """What a search found; with its channels left open, if need be fewer of them, until it fits for all of the ways."""
    scheme = ways.described.load_scheme(file)
    if ways.source.open_channels:
        scheme = with_fewer_channels(replace(scheme, channels={}), ways)
    return ways.checked(scheme)


def with_fewer_channels(scheme: UpdateScheme, ways: WaysOfOneScheme) -> UpdateScheme:
    """The scheme with fewer channels until it fits: the scores of a dynamic choice take room on a microcontroller."""
    convolutions = {convolution.name: convolution for convolution in ways.described.operations.convolutions}
    while scheme.weights and not ways.fits(scheme):
        # a tenth of the layer that has the most channels in training
        updated = {name: scheme.updated_channels(convolutions[name]) for name in scheme.weights}
        largest = max(updated, key=lambda name: updated[name])
        count = updated[largest] * 9 // 10
        weights = {name: ratio for name, ratio in scheme.weights.items() if name != largest}
        if count:
            weights[largest] = count / convolutions[largest].in_channels
        scheme = replace(scheme, weights=weights)
    return scheme


def keep_scheme(path: Path, schemes: Sequence[UpdateScheme], are_random: bool) -> None:
    """Writes the scheme of each seed, or raises ``UserError`` if those of an earlier start were others.

    Args:
        path: Of the scheme.
        schemes: For each seed.
        are_random: Whether each seed has its own, with the seed in the name of its file.
    """
    for seed, scheme in enumerate(schemes if are_random else schemes[:1]):
        file = path.with_name(f"{path.stem}-seed{seed}.json") if are_random else path
        if not file.exists():
            scheme.save(file)
        elif replace(UpdateScheme.load(file), provenance={}) != replace(scheme, provenance={}):
            raise UserError(
                f"the study was begun with another scheme, {file}: give that one, another name or another --out_dir"
            )
