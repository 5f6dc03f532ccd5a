"""Schemes of ways: rules fill the budget, random ones differ, searches go on, and nothing exceeds the budget."""

from dataclasses import replace

import pytest

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies import way_schemes
from microtune.recipes.studies.way_schemes import (
    WaysOfOneScheme,
    budget_by_name,
    keep_scheme,
    random_schemes,
    scheme_by_rule,
    schemes_without_search,
    with_fewer_channels,
)
from microtune.recipes.studies.ways import Way
from microtune.recipes.training.memory_figures import scheme_fits
from microtune.recipes.training.networks import describe_network

BUDGETS = ["extra8", "extra64", "peak40", "peak200", "stm32f746"]


def ways_of(budget, *ways, resolution=32):
    described = describe_network("none", (3, resolution, resolution), 10)
    named = {f"way{number}": way for number, way in enumerate(ways or [Way("biases")])}
    return WaysOfOneScheme(described, budget_by_name(budget), named)


def within(scheme, described, budget):
    """By hand."""
    operations = described.operations
    if budget == "stm32f746":
        return scheme_fits(PeakMemory(operations), scheme, budget_by_name(budget).microcontroller)
    if budget.startswith("peak"):
        return PeakMemory(operations).peak_bytes(scheme) <= 1024 * int(budget.removeprefix("peak"))
    taken = extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)
    return taken <= 1024 * int(budget.removeprefix("extra"))


def deeper(scheme, described, rule):
    """The next larger scheme of the rule, made by hand; None if it already has all."""
    convolutions = described.operations.convolutions
    expanding = [layer for layer in convolutions if is_expanding(layer)]
    wanted = {"last_layers": convolutions, "expanding": expanding, "biases": []}[rule]
    depth = scheme.bias_depth + 1
    if rule == "expanding":
        count = len(scheme.weights) + 1
        if count > len(wanted):
            return None
        depth = len(convolutions) - convolutions.index(wanted[-count])
    if depth > len(convolutions):
        return None
    weights = {layer.name: 1.0 for layer in wanted if layer in convolutions[-depth:]}
    return UpdateScheme(scheme.network, depth, weights)


@pytest.mark.parametrize("budget", BUDGETS)
def test_rules_fill_the_budget(budget):
    ways = ways_of(budget, resolution=96 if budget == "stm32f746" else 32)
    for rule in ("last_layers", "biases", "expanding"):
        scheme = scheme_by_rule(Way(rule), ways.described, ways.fits)
        assert within(scheme, ways.described, budget)
        assert set(scheme.weights.values()) <= {1.0}
        assert bool(scheme.weights) <= (rule != "biases")
        larger = deeper(scheme, ways.described, rule)
        assert larger is None or not within(larger, ways.described, budget)
        if scheme.bias_depth and larger:
            assert scheme.weights.items() <= larger.weights.items()


def test_rules_go_no_deeper_than_they_may():
    ways = ways_of("extra64")
    for rule in ("last_layers", "biases", "expanding"):
        deepest = scheme_by_rule(Way(rule), ways.described, ways.fits).bias_depth
        shallow = scheme_by_rule(Way(rule, deepest=deepest - 1), ways.described, ways.fits)
        assert 0 < shallow.bias_depth < deepest


def test_a_ratio_is_that_of_all_layers():
    ways = ways_of("extra64")
    scheme = scheme_by_rule(Way("expanding", ratio=0.25), ways.described, ways.fits)
    counts = {layer.name: layer.in_channels for layer in ways.described.operations.convolutions}
    assert len(scheme.weights) > 3
    assert all(ratio == max(0.25, 1 / counts[name]) for name, ratio in scheme.weights.items())


@pytest.mark.parametrize("budget", BUDGETS[:3])
def test_random_schemes_fit_and_differ(budget):
    ways = ways_of(budget)
    schemes = random_schemes(ways.described, ways.budget, None, seeds=4)
    assert all(within(scheme, ways.described, budget) for scheme in schemes)
    assert len({(scheme.bias_depth, *scheme.weights.items()) for scheme in schemes}) > 1
    expanding = {layer.name for layer in ways.described.operations.convolutions if is_expanding(layer)}
    for scheme in schemes:
        assert scheme.weights.keys() <= expanding
        assert set(scheme.weights.values()) <= {0.125, 0.25, 0.5, 1.0}
        scheme.check(ways.described.operations.convolutions, ways.described.name)


def test_random_schemes_of_a_table(tmp_path):
    nothing = {"gain_std": 0.0, "runs": 1}
    rows = [Contribution("bias", depth, "", 0.0, gain=0.1, **nothing) for depth in (6, 12)]
    rows += [Contribution("weight", 12, "features.16.conv.0.0", ratio, gain=0.2, **nothing) for ratio in (0.5, 0.75)]
    ContributionTable(tuple(rows)).save(tmp_path / "table.csv")
    ways = ways_of("extra500")
    schemes = random_schemes(ways.described, ways.budget, tmp_path / "table.csv", seeds=30)
    assert random_schemes(ways.described, ways.budget, tmp_path / "table.csv", seeds=3) == schemes[:3]
    assert {scheme.bias_depth for scheme in schemes} == {0, 6, 12}
    assert {tuple(scheme.weights.items()) for scheme in schemes} == {
        *((), (("features.16.conv.0.0", 0.5),), (("features.16.conv.0.0", 0.75),))
    }


def test_a_shared_scheme_fits_for_all_of_its_ways():
    """Choosing anew takes room on a device: the static way gets the same scheme, or differences would mean nothing."""
    static, dynamic = Way("last_layers"), Way("last_layers", criterion="loss_decrease", rechoose_every=5)
    budget = "peak200"
    alone, both = ways_of(budget, static, resolution=96), ways_of(budget, static, dynamic, resolution=96)
    names = [layer.name for layer in alone.described.operations.convolutions if is_expanding(layer)]
    scheme = UpdateScheme(alone.described.name, 40, dict.fromkeys(names[-9:], 0.9))
    while not alone.fits(scheme):
        scheme = replace(scheme, weights={name: ratio * 0.95 for name, ratio in scheme.weights.items()})
    assert not both.fits(scheme)
    # extra memory leaves such things out
    assert ways_of("extra9999", static, dynamic, resolution=96).fits(scheme)


def test_open_channels_become_fewer_until_their_scores_fit():
    """A microcontroller's peak has room for the step, the scores and the sums; extra memory leaves these out."""
    dynamic = Way("accuracy", open_channels=True, criterion="loss_decrease", rechoose_every=50)
    ways = ways_of("stm32f746", dynamic, resolution=96)
    names = [layer.name for layer in ways.described.operations.convolutions if is_expanding(layer)]
    scheme = UpdateScheme(ways.described.name, 40, dict.fromkeys(names[-9:], 0.9))
    assert not ways.fits(scheme)
    smaller = with_fewer_channels(scheme, ways)
    assert ways.fits(smaller)
    assert smaller.weights
    assert with_fewer_channels(scheme, ways_of("extra640", dynamic, resolution=96)) == scheme


def test_what_a_search_finds_may_leave_nothing_to_choose():
    """Whole layers: a study of hours must not end there."""
    ways = ways_of("extra64", Way("accuracy", open_channels=True, criterion="taylor", rechoose_every=5))
    scheme = UpdateScheme(ways.described.name, 3)
    assert ways.checked(scheme) == scheme


# ---- what is refused


@pytest.mark.parametrize(
    ("budget", "way", "message"),
    [
        ("none", Way("biases"), "biases fills a budget: give one with --budgets, such as extra64 or stm32f746"),
        (
            "extra0.01",
            Way("biases"),
            "scheme way0 needs 0.1 KiB of extra memory, but the budget is 0.0 KiB; the smalle",
        ),
        ("extra0.01", Way("random"), "budget_bytes is 10 of extra memory, but the smallest scheme"),
        ("rp2040", Way("full"), "scheme way0: one training step needs "),
        ("extra8", Way("full"), "scheme way0 needs "),
        (
            "extra64",
            Way("biases", criterion="taylor", rechoose_every=5),
            "way way0 chooses channels every 5 steps, but its scheme leaves none to choose: ",
        ),
    ],
)
def test_what_cannot_be(budget, way, message):
    ways = ways_of(budget, way, resolution=96 if budget == "rp2040" else 32)
    with pytest.raises(UserError) as refused:
        schemes_without_search(ways, None, seeds=2)
    assert message in str(refused.value), str(refused.value)


def test_oversize_scheme_is_told_with_what_costs_most(tmp_path):
    scheme = UpdateScheme("mobilenet_v2-w0.35", 12, {"features.16.conv.0.0": 0.5, "features.14.conv.0.0": 1.0})
    scheme.save(tmp_path / "scheme.json")
    way = Way(str(tmp_path / "scheme.json"))
    assert schemes_without_search(ways_of("extra100", way), None, seeds=2) == [scheme, scheme]
    assert schemes_without_search(ways_of("none", way), None, seeds=1) == [scheme]
    with pytest.raises(UserError) as refused:
        schemes_without_search(ways_of("extra20", way), None, seeds=2)
    expected = (
        r"scheme way0 needs 26\.3 KiB of extra memory, but the budget is 20\.0 KiB; the smallest scheme, the "
        r"classifier only, needs 0\.1 KiB; most of it goes to features\.16\.conv\.0\.0 \(10\.6 KiB\), "
        r"features\.14\.conv\.0\.0 \(.* KiB\), .*: give another scheme or budget$"
    )
    assert refused.match(expected)


@pytest.mark.parametrize("name", ["best", "extra", "extra0", "peak-1", "64"])
def test_budgets_that_there_are_not(name):
    with pytest.raises(UserError, match=f"budget is '{name}': give KiB of extra memory such as extra64 or of peak"):
        budget_by_name(name)


def test_schemes_are_kept(tmp_path):
    one, other = UpdateScheme("net", 1), UpdateScheme("net", 2)
    keep_scheme(tmp_path / "a.json", [one, one], are_random=False)
    keep_scheme(tmp_path / "r.json", [one, other], are_random=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "r-seed0.json", "r-seed1.json"}
    keep_scheme(tmp_path / "a.json", [replace(one, provenance={"by": "hand"})], are_random=False)
    with pytest.raises(UserError, match=f"the study was begun with another scheme, {tmp_path}/a.json: give that one"):
        keep_scheme(tmp_path / "a.json", [other], are_random=False)
    assert UpdateScheme.load(tmp_path / "a.json") == one


def test_searches_that_differ_have_other_names():
    source = Way("accuracy", level="layer", evaluations=3).source
    assert way_schemes.search_name(source) != way_schemes.search_name(replace(source, evaluations=4))
