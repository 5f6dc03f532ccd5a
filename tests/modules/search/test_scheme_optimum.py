"""The proven optimum equals the best of all genomes, counted out."""

import itertools
import math
import random

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import flash_bytes
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.random_search import random_search
from microtune.modules.search.scheme_optimum import best_at_depths, proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import describe_network

MOBILENET = describe_network("none", (3, 32, 32), 10).operations
RESNET = find_operations(torchvision.models.resnet18(num_classes=10), (3, 32, 32))
PEAK_MEMORIES = {
    "default": PeakMemory(MOBILENET),
    "without reordering": PeakMemory(MOBILENET, reordering=False),
    "other options": PeakMemory(MOBILENET, optimizer_state="adam", gradient_bytes=1, depthwise_in_place=False),
}
NAMES = [convolution.name for convolution in MOBILENET.convolutions]
gains = st.floats(-0.02, 0.05)


def all_genomes(problem: SearchProblem) -> list[tuple[int, ...]]:
    counts = [len(problem.depths), *(len(ratios) for ratios in problem.ratios)]
    genomes = itertools.product(*map(range, counts))
    return [genome for genome in genomes if problem.canonical(genome) == genome]


def best_of_all(problem: SearchProblem) -> float:
    return max(problem.score(genome) for genome in all_genomes(problem) if problem.fits(genome))


@st.composite
def tables(draw) -> ContributionTable:
    """Two or three depths, three layers with up to three ratios."""
    base = draw(st.integers(10, 40))
    depths = sorted({base, *draw(st.lists(st.integers(1, base), min_size=1, max_size=2))})
    layers = draw(st.lists(st.sampled_from(NAMES[-base:]), min_size=1, max_size=3, unique=True))
    ratios = draw(st.lists(st.sampled_from([0.125, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=3, unique=True))
    rows = [Contribution("bias", depth, "", 0.0, draw(gains), 0.0, 1) for depth in depths]
    rows += [
        Contribution("weight", base, layer, ratio, draw(gains), 0.0, 1)
        for layer, ratio in itertools.product(layers, ratios)
    ]
    return ContributionTable(tuple(rows))


@settings(max_examples=20, deadline=None)
@given(tables(), st.floats(0, 1), st.sampled_from([0.5, 1.0, 1.5]))
def test_best_at_each_depth_is_the_best_of_all_there(table, room, power):
    """By gains to a power, whose signs stay."""
    problem = SearchProblem("m", PEAK_MEMORIES["default"], table, round((8 + 100 * room) * 1024), "extra")
    found = {genome[0]: genome for genome in best_at_depths(problem, range(len(problem.depths)), power)}

    def score(genome):
        return sum(math.copysign(abs(gain) ** power, gain) for gain in problem.gains_of(genome))

    best: dict[int, float] = {}
    for genome in filter(problem.fits, all_genomes(problem)):
        best[genome[0]] = max(best.get(genome[0], -math.inf), score(genome))
    assert {depth: pytest.approx(score(genome)) for depth, genome in found.items()} == best
    assert all(problem.fits(genome) for genome in found.values())


@settings(max_examples=80, deadline=None)
@given(tables(), st.sampled_from(sorted(PEAK_MEMORIES)), st.sampled_from(["peak", "extra"]), st.floats(0, 1))
def test_optimum_is_the_best_of_all(table, options, memory, room):
    free = SearchProblem("x", PEAK_MEMORIES[options], table, 1e9, memory)
    needed = [free.memory_bytes(genome) for genome in all_genomes(free)]
    # some of the budgets are just what a scheme needs
    budget = sorted(needed)[int(room * (len(needed) - 1))]
    problem = SearchProblem("x", PEAK_MEMORIES[options], table, budget, memory)
    optimum = proven_optimum(problem)
    assert problem.fits(optimum.genome)
    assert optimum.score == problem.score(optimum.genome)
    assert optimum.score == pytest.approx(best_of_all(problem), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(tables(), st.sampled_from(sorted(PEAK_MEMORIES)), st.floats(0.2, 1), st.floats(0, 1))
def test_optimum_is_the_best_of_all_within_the_flash(table, options, room, flash_room):
    free = SearchProblem("x", PEAK_MEMORIES[options], table, 1e9)
    genomes = all_genomes(free)
    needed = sorted(free.memory_bytes(genome) for genome in genomes)
    frozen = {genome: flash_bytes(MOBILENET, free.scheme(genome)) for genome in genomes}
    budget = needed[int(room * (len(needed) - 1))]
    limit = sorted(frozen.values())[int(flash_room * (len(frozen) - 1))]
    fitting = [g for g in genomes if free.memory_bytes(g) <= budget and frozen[g] <= limit]
    try:
        problem = SearchProblem("x", PEAK_MEMORIES[options], table, budget, flash_limit_bytes=limit)
    except UserError:
        assert not fitting
        return
    assert {genome for genome in genomes if problem.fits(genome)} == set(fitting)
    optimum = proven_optimum(problem)
    assert problem.fits(optimum.genome)
    assert optimum.score == pytest.approx(max(map(problem.score, fitting)), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(tables(), st.sampled_from(sorted(PEAK_MEMORIES)), st.sampled_from(["peak", "extra"]), st.integers(0, 99))
def test_no_search_beats_the_optimum(table, options, memory, seed):
    free = SearchProblem("x", PEAK_MEMORIES[options], table, 1e9, memory)
    needed = [free.memory_bytes(free.random_genome(random.Random(seed + i))) for i in range(5)]
    problem = SearchProblem("x", PEAK_MEMORIES[options], table, float(np.median(needed)), memory)
    optimum = proven_optimum(problem).score
    for blind in (False, True):
        assert random_search(problem, 20, seed, blind).score <= optimum + 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_small_differences_count(scale):
    """Two layers of the same shape: the one that gains a millionth more is taken, however small the gains."""
    twins = (NAMES[-9], NAMES[-6])
    rows = [Contribution("bias", 9, "", 0.0, 0.0, 0.0, 1)]
    rows += [
        Contribution("weight", 9, layer, 0.5, 1e-3 * scale * (1 + 1e-6 * (layer == twins[1])), 0.0, 1)
        for layer in twins
    ]
    free = SearchProblem("x", PeakMemory(MOBILENET), ContributionTable(tuple(rows)), 1e9, "extra")
    assert free.memory_bytes((1, 1, 0)) == free.memory_bytes((1, 0, 1))
    budget = free.memory_bytes((1, 1, 0))
    problem = SearchProblem("x", PeakMemory(MOBILENET), ContributionTable(tuple(rows)), budget, "extra")
    assert proven_optimum(problem).genome == (1, 0, 1)


def resnet_table() -> ContributionTable:
    names = [convolution.name for convolution in RESNET.convolutions]
    layers = [name for name in names if name in ("layer4.0.conv1", "layer4.0.downsample.0", "layer4.1.conv2")]
    rows = [Contribution("bias", depth, "", 0.0, 0.01, 0.0, 1) for depth in (2, 5)]
    rows += [Contribution("weight", 5, layer, ratio, ratio / 50, 0.0, 1) for layer in layers for ratio in (0.25, 0.5)]
    return ContributionTable(tuple(rows))


def test_shared_inputs_are_refused_with_peak_memory_only():
    problem = SearchProblem("x", PeakMemory(RESNET), resnet_table(), 1e9)
    expected = "layer4.0.conv1 and layer4.0.downsample.0 read the same activation.* leave all but one of them out"
    with pytest.raises(UserError, match=expected):
        proven_optimum(problem)
    free = SearchProblem("x", PeakMemory(RESNET), resnet_table(), 1e9, "extra")
    problem = SearchProblem("x", PeakMemory(RESNET), resnet_table(), free.memory_bytes((2, 1, 1, 1)), "extra")
    assert proven_optimum(problem).score == pytest.approx(best_of_all(problem))


def random_table(seed: int) -> ContributionTable:
    rng = random.Random(seed)
    rows = [Contribution("bias", depth, "", 0.0, 0.001 * depth, 0.0, 1) for depth in (10, 20, 30)]
    rows += [
        Contribution("weight", 30, name, ratio, rng.uniform(0, 0.02) * ratio**0.5, 0.0, 1)
        for name in NAMES[-30::3]
        for ratio in (0.25, 0.5, 1.0)
    ]
    return ContributionTable(tuple(rows))


# HiGHS of SciPy 1.17 prints a line from C in each of these
@pytest.mark.parametrize(
    ("seed", "memory", "budget"),
    [(4, "extra", 40_000), (11, "peak", 60_000), (16, "peak", 80_000), (17, "peak", 80_000), (18, "extra", 40_000)],
)
def test_standard_output_stays_clean(seed, memory, budget, capfd):
    problem = SearchProblem("x", PeakMemory(MOBILENET), random_table(seed), budget, memory)
    print("before")
    proven_optimum(problem)
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_nothing_to_choose():
    rows = (Contribution("bias", 3, "", 0.0, 0.01, 0.0, 1), Contribution("bias", 7, "", 0.0, 0.005, 0.0, 1))
    problem = SearchProblem("x", PeakMemory(MOBILENET), ContributionTable(rows), 1e9)
    assert proven_optimum(problem).genome == (1,)
    least = SearchProblem("x", PeakMemory(MOBILENET), ContributionTable(rows), problem.memory_bytes((0,)))
    assert proven_optimum(least).genome == (0,)
