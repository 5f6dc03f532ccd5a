"""Promises of the search: bytes are those of the accounts, nothing is over the budget, what fits is filled."""

import random
import re

import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes, flash_bytes
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import describe_network

MOBILENET = describe_network("none", (3, 32, 32), 10).operations
RESNET = find_operations(torchvision.models.resnet18(num_classes=10), (3, 32, 32))
PEAK_MEMORIES = {
    "mobilenet": PeakMemory(MOBILENET),
    "mobilenet, all at the end": PeakMemory(MOBILENET, reordering=False, optimizer_state="momentum"),
    "resnet": PeakMemory(RESNET),  # its shortcuts read what the first convolution beside them reads
}
RATIOS = (0.125, 0.25, 0.5, 1.0)


def some_table(operations, depths, every: int, seed: int, ratios=RATIOS) -> ContributionTable:
    """Random gains, some of them negative, of some depths and of every so many layers within the deepest."""
    rng = random.Random(seed)
    names = [convolution.name for convolution in operations.convolutions[-max(depths) :: every]]
    rows = [Contribution("bias", depth, "", 0.0, rng.gauss(0.01, 0.01), 0.0, 1) for depth in depths]
    rows += [
        Contribution("weight", max(depths), name, ratio, rng.gauss(0.01, 0.01), 0.0, 1)
        for name in names
        for ratio in ratios
    ]
    return ContributionTable(tuple(rows))


def some_problem(network: str, memory: str, room: float, seed: int = 0, flash_limit_bytes=None) -> SearchProblem:
    """A budget between the least (room 0) and the most (room 1) that a scheme needs."""
    peak_memory = PEAK_MEMORIES[network]
    depths, every = ((2, 5, 8, 10), 2) if network == "resnet" else ((2, 5, 12, 20, 21, 30), 4)
    table = some_table(peak_memory.operations, depths, every, seed)
    free = SearchProblem("x", peak_memory, table, 1e9, memory)
    least, most = (
        free.memory_bytes(genome)
        for genome in ((0,) * (1 + len(free.layers)), (len(depths),) + (4,) * len(free.layers))
    )
    return SearchProblem("x", peak_memory, table, least + room * (most - least), memory, flash_limit_bytes)


PROBLEMS = {
    (network, memory, room): some_problem(network, memory, room)
    for network in PEAK_MEMORIES
    for memory in ("peak", "extra")
    for room in (0.0, 0.1, 0.4, 1.0)
}
problems = st.sampled_from(sorted(PROBLEMS)).map(PROBLEMS.__getitem__)


@st.composite
def problems_and_genomes(draw):
    problem = draw(problems)
    return problem, problem.random_genome(random.Random(draw(st.integers(0, 2**32))))


@settings(max_examples=150, deadline=None)
@given(problems_and_genomes())
def test_bytes_are_those_of_the_accounts(drawn):
    problem, genome = drawn
    scheme, operations = problem.scheme(genome), problem.peak_memory.operations
    peak_bytes = problem.peak_memory.peak_bytes(scheme)
    extra_bytes = extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)
    assert problem.memory_bytes(genome) == (peak_bytes if problem.memory == "peak" else extra_bytes)
    assert problem.fits(genome) == (problem.memory_bytes(genome) <= problem.budget_bytes)


def test_several_moments_count():
    assert PROBLEMS["mobilenet", "peak", 0.4].account.constant.shape[1] > 1
    assert PROBLEMS["mobilenet, all at the end", "peak", 0.4].account.constant.shape[1] > 5
    assert not PROBLEMS["resnet", "peak", 0.4].account.is_linear


@settings(max_examples=100, deadline=None)
@given(problems_and_genomes(), st.floats(0, 1), st.integers(0, 99))
def test_a_repaired_genome_fits_and_is_full(drawn, noise, seed):
    problem, genome = drawn
    repaired = problem.repair(genome, random.Random(seed), noise)
    assert problem.fits(repaired)
    assert problem.canonical(repaired) == repaired
    # depths are options of part 0
    options = [len(problem.depths), *(len(ratios) for ratios in problem.ratios)]
    for part, count in enumerate(options):
        for option in range(repaired[part] + 1, count):
            raised = problem.canonical((*repaired[:part], option, *repaired[part + 1 :]))
            assert problem.score(raised) <= problem.score(repaired) + 1e-12 or not problem.fits(raised)
    assert problem.repair(repaired) == repaired


@settings(max_examples=50, deadline=None)
@given(problems_and_genomes())
def test_repair_only_adds_to_what_fits(drawn):
    problem, genome = drawn
    if not problem.fits(genome):
        genome = problem.blind_repair(genome, random.Random(0))
    repaired = problem.repair(genome)
    assert problem.score(repaired) >= problem.score(genome) - 1e-12
    assert all(after >= before for before, after in zip(genome, repaired, strict=True))


def test_noise_gives_different_fillings_and_a_seed_the_same():
    problem = PROBLEMS["mobilenet", "peak", 0.4]
    nothing = (0,) * (1 + len(problem.layers))
    fillings = [problem.repair(nothing, random.Random(seed), noise=1.0) for seed in range(10)]
    assert len(set(fillings)) > 1
    assert fillings == [problem.repair(nothing, random.Random(seed), noise=1.0) for seed in range(10)]
    assert problem.repair(nothing, random.Random(1), noise=0.0) == problem.repair(nothing)


@settings(max_examples=50, deadline=None)
@given(problems_and_genomes(), st.integers(0, 99))
def test_blind_repair_fits_and_only_throws_out(drawn, seed):
    problem, genome = drawn
    repaired = problem.blind_repair(genome, random.Random(seed))
    assert problem.fits(repaired)
    assert all(after in (before, 0) for before, after in zip(genome[1:], repaired[1:], strict=True))
    assert repaired[0] == genome[0] or not any(repaired[1:])
    assert repaired == genome or not problem.fits(genome)


@settings(max_examples=15, deadline=None)
@given(problems_and_genomes())
def test_neighbours_are_distinct_and_fit(drawn):
    problem, genome = drawn
    genome = problem.repair(genome)
    neighbours = problem.neighbours(genome)
    assert len(set(neighbours)) == len(neighbours)
    assert genome not in neighbours
    assert all(problem.fits(neighbour) and problem.canonical(neighbour) == neighbour for neighbour in neighbours)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("option", [0, 1, 99])
def test_from_the_back_takes_as_many_of_the_last_layers_as_fit(name, option):
    problem = PROBLEMS[name]
    genome = problem.from_the_back(option)
    assert problem.fits(genome)
    assert problem.canonical(genome) == genome
    updated = [index for index, ratio in enumerate(genome[1:]) if ratio]
    assert updated == list(range(len(problem.layers) - len(updated), len(problem.layers)))
    if option == 0:
        assert not updated
    elif 0 < len(updated) < len(problem.layers):
        one_more = list(genome)
        one_more[-len(updated) - 1] = min(option, len(problem.ratios[-len(updated) - 1]) - 1)
        deeper = [problem.canonical((depth, *one_more[1:])) for depth in range(genome[0], len(problem.depths))]
        assert not any(problem.fits(other) for other in deeper if sum(map(bool, other[1:])) > len(updated))


def test_what_is_left_out_makes_genomes_differ_where_all_fits():
    problem = PROBLEMS["mobilenet", "extra", 1.0]
    rng = random.Random(0)
    filled = {problem.repair(problem.random_genome(rng), rng, 0.5) for _ in range(50)}
    loose = {problem.repair(problem.random_genome(rng), rng, 0.5, left_out=0.5) for _ in range(50)}
    assert len(loose) > 2 * len(filled)
    assert all(problem.fits(genome) for genome in loose)


def test_a_neighbour_keeps_its_move():
    """Filling must not undo a lowering, or the neighbours of a full genome would all be the genome itself."""
    problem = PROBLEMS["mobilenet", "peak", 0.4]
    genome = problem.repair(problem.random_genome(random.Random(0)))
    neighbours = problem.neighbours(genome)
    for part in range(len(genome)):
        if genome[part]:
            assert any(neighbour[part] == genome[part] - 1 for neighbour in neighbours)
    assert len(neighbours) > 20


def test_layers_outside_the_depth_do_not_count():
    problem = PROBLEMS["mobilenet", "peak", 1.0]
    assert problem.depths == (0, 2, 5, 12, 20, 21, 30)
    assert list(problem.layers) == [c.name for c in MOBILENET.convolutions[-30::4]]
    assert problem.ratios == ((0.0, *RATIOS),) * 8
    everywhere = (2, *(1,) * 8)
    # of every fourth layer of 30, only the last two are among the last five and six
    assert problem.canonical(everywhere) == (2, 0, 0, 0, 0, 0, 0, 0, 1)
    for of_genome in (problem.score, problem.memory_bytes, problem.fits, problem.scheme, problem.repair):
        assert of_genome(everywhere) == of_genome(problem.canonical(everywhere))


def test_score_is_the_sum_of_gains():
    table = some_table(MOBILENET, (4, 8), 2, seed=5)
    problem = SearchProblem("x", PeakMemory(MOBILENET), table, 1e9)
    second, last = problem.layers[1], problem.layers[-1]
    expected = table.bias_gains[8] + table.weight_gains[second][0.5] + table.weight_gains[last][0.125]
    assert problem.score((2, 0, 3, 0, 1)) == pytest.approx(expected)
    assert problem.score((0, 0, 0, 0, 0)) == 0


def test_the_best_gain_per_byte_goes_first():
    """Of two layers of the same shape, room for one: the one that gains more; and a lowered depth keeps it."""
    last, other = MOBILENET.convolutions[-1].name, MOBILENET.convolutions[-4].name
    rows = [Contribution("bias", depth, "", 0.0, 0.0, 0.0, 1) for depth in (1, 6)]
    rows += [
        Contribution("weight", 6, other, 0.25, 0.01, 0.0, 1),
        Contribution("weight", 6, last, 0.25, 0.02, 0.0, 1),
    ]
    table = ContributionTable(tuple(rows))
    free = SearchProblem("x", PeakMemory(MOBILENET), table, 1e9, "extra")
    assert free.layers == (other, last)
    problem = SearchProblem("x", PeakMemory(MOBILENET), table, free.memory_bytes((1, 0, 1)), "extra")
    assert problem.repair((1, 0, 0)) == (1, 0, 1)
    assert problem.repair((2, 1, 1)) == (1, 0, 1)


def test_scheme_holds_depth_ratios_and_provenance():
    problem = PROBLEMS["mobilenet", "peak", 1.0]
    scheme = problem.scheme((6, 0, 0, 0, 0, 0, 2, 0, 4), {"seed": 0})
    expected = {problem.layers[5]: 0.25, problem.layers[7]: 1.0}
    assert scheme == UpdateScheme("x", 30, expected, provenance={"seed": 0})


@settings(max_examples=30, deadline=None)
@given(problems_and_genomes())
def test_genome_of_a_scheme_is_its_own(drawn):
    problem, genome = drawn
    assert problem.genome_of(problem.scheme(genome)) == problem.repair(genome)


def test_genome_of_a_foreign_scheme_is_the_nearest_below():
    table = some_table(MOBILENET, (4, 8, 12), 2, seed=5)
    negative = tuple(Contribution(**{**row.__dict__, "gain": -0.01}) for row in table.rows)  # nothing is filled
    problem = SearchProblem("x", PeakMemory(MOBILENET), ContributionTable(negative), 1e9)
    names = [convolution.name for convolution in MOBILENET.convolutions]
    # 12 deep: every second layer from the twelfth last on
    scheme = UpdateScheme("x", 9, {names[-8]: 0.3, names[-4]: 0.5, names[-7]: 1.0}, {names[-4]: list(range(3))})
    few = int(3 / MOBILENET.convolutions[-4].in_channels >= 0.125)
    assert problem.genome_of(scheme) == (2, 0, 0, 2, 0, few, 0)
    assert problem.genome_of(UpdateScheme("x", 40, {})) == (3, 0, 0, 0, 0, 0, 0)
    assert problem.genome_of(UpdateScheme("x", 5, {})) == (1, 0, 0, 0, 0, 0, 0)
    with pytest.raises(UserError, match="the scheme is for y, but the network is x"):
        problem.genome_of(UpdateScheme("y", 5, {}))


def test_a_table_of_biases_alone():
    table = some_table(MOBILENET, (3, 6), 1, seed=0, ratios=())
    problem = SearchProblem("x", PeakMemory(MOBILENET), table, 1e9)
    best = max(problem.depths, key=table.bias_gains.__getitem__)
    assert problem.repair((0,)) == (problem.depths.index(best),)
    assert problem.neighbours((1,)) == [(0,), (2,)]


def test_flash_asks_for_updates():
    """The frozen weights are a little too many: only schemes that take some into SRAM fit."""
    free = some_problem("mobilenet", "peak", 1.0)
    limit = flash_bytes(MOBILENET, UpdateScheme("x", 0)) - 5000
    problem = some_problem("mobilenet", "peak", 0.5, flash_limit_bytes=limit)
    nothing = (0,) * (1 + len(problem.layers))
    assert free.fits(nothing)
    assert not problem.fits(nothing)
    assert problem.memory_bytes(nothing) == free.memory_bytes(nothing)
    rng = random.Random(0)
    for _ in range(50):
        genome = problem.random_genome(rng)
        for repaired in (problem.repair(genome), problem.blind_repair(genome, rng)):
            scheme = problem.scheme(repaired)
            assert problem.fits(repaired)
            assert flash_bytes(MOBILENET, scheme) <= limit
            assert PEAK_MEMORIES["mobilenet"].peak_bytes(scheme) <= problem.budget_bytes
    assert all(problem.fits(neighbour) for neighbour in problem.neighbours(repaired))


def test_what_fits_the_flash_is_found_if_there_is_anything():
    """Only updating the second layer alone fits: more updates one after another lead past it."""
    names = ("features.14.conv.2", "features.15.conv.0.0")
    rows = [Contribution("bias", depth, "", 0.0, 0.0, 0.0, 1) for depth in (1, 10)]
    rows += [Contribution("weight", 10, name, 0.125, 0.0, 0.0, 1) for name in names]
    table = ContributionTable(tuple(rows))
    only = SearchProblem("x", PeakMemory(MOBILENET), table, 1e9).scheme((2, 0, 1))
    budget, limit = PeakMemory(MOBILENET).peak_bytes(only), flash_bytes(MOBILENET, only)
    problem = SearchProblem("x", PeakMemory(MOBILENET), table, budget, flash_limit_bytes=limit)
    assert {problem.repair((depth, *ratios)) for depth in range(3) for ratios in ((0, 0), (1, 0), (1, 1))} == {
        (2, 0, 1)
    }
    for budget_bytes, limit_bytes in ((budget - 1, limit), (budget, limit - 1)):
        with pytest.raises(UserError, match="no scheme was found within both this and budget_bytes"):
            SearchProblem("x", PeakMemory(MOBILENET), table, budget_bytes, flash_limit_bytes=limit_bytes)


def test_flash_does_not_count_with_extra_memory():
    problem = some_problem("mobilenet", "extra", 0.5, flash_limit_bytes=1)
    assert problem.fits((0,) * (1 + len(problem.layers)))


@pytest.mark.parametrize("memory", ["peak", "extra"])
def test_too_small_a_budget_says_what_would_do(memory):
    table = some_table(MOBILENET, (4, 8), 2, seed=0)
    with pytest.raises(UserError, match=f"budget_bytes is 10 of {memory} memory, but the smallest scheme") as error:
        SearchProblem("x", PeakMemory(MOBILENET), table, 10, memory)
    least = float(re.search(r"needs [\d.]+ KiB: give at least ([\d.]+) bytes$", str(error.value))[1])
    SearchProblem("x", PeakMemory(MOBILENET), table, least, memory)
    with pytest.raises(UserError, match="the smallest scheme"):
        SearchProblem("x", PeakMemory(MOBILENET), table, least - 1, memory)


def test_too_little_flash_says_what_is_needed():
    needed = flash_bytes(MOBILENET, UpdateScheme("x", 0))
    expected = f"flash_limit_bytes is 1000, but the frozen weights need {needed} bytes .* take more flash or a narrower"
    with pytest.raises(UserError, match=expected):
        some_problem("mobilenet", "peak", 0.5, flash_limit_bytes=1000)
    with pytest.raises(UserError, match="flash_limit_bytes is 0: give a positive number"):
        some_problem("mobilenet", "peak", 0.5, flash_limit_bytes=0)


def test_other_mistakes_are_named():
    table = some_table(MOBILENET, (4, 8), 2, seed=0)
    with pytest.raises(UserError, match="memory is 'ram': give one of peak, extra"):
        SearchProblem("x", PeakMemory(MOBILENET), table, 1e9, "ram")
    with pytest.raises(UserError, match="is no convolution of the network"):
        SearchProblem("x", PeakMemory(RESNET), table, 1e9)
    without_base = ContributionTable(tuple(row for row in table.rows if row.kind == "weight" or row.bias_depth < 8))
    with pytest.raises(UserError, match="lies outside its deepest bias row, 4: measure bias depth 8 too"):
        SearchProblem("x", PeakMemory(MOBILENET), without_base, 1e9)
