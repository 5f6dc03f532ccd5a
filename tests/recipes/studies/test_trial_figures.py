"""Figures of trials, held to small sets of rows that are worked by hand."""

import math
from pathlib import Path

import pytest

from microtune.modules.csv_rows import read_rows
from microtune.recipes.studies.trial_figures import (
    TrialRow,
    at_best_rate,
    best_rates,
    ceiling,
    chosen_by,
    figures_of,
    retest,
    spread,
    truth_of,
    with_truth,
)


def row(scheme, steps, seed, val, test=None, rate=0.1, loss=1.0):
    return TrialRow(
        "digits", "extra64", scheme, steps, rate, seed, val, val if test is None else test, loss, 1e4, 5, 1, 9
    )


def test_retest_is_the_mean_over_pairs_of_seeds():
    """By hand: seeds 0 and 1 agree, seed 2 has the reverse order: correlations 1, -1, -1."""
    values = {0: (0.1, 0.2, 0.3), 1: (0.4, 0.5, 0.6), 2: (0.9, 0.8, 0.7)}
    rows = [row(f"random_{i}", 60, seed, value) for seed, of in values.items() for i, value in enumerate(of)]
    assert retest(rows)["val_top1"] == pytest.approx(-1 / 3)
    assert retest(rows)["val_loss"] is None  # all the same
    assert retest(rows[:3])["val_top1"] is None  # of one seed


def test_a_diverged_training_is_the_worst_by_its_loss():
    rows = [row(f"random_{i}", 60, 0, 0.5, loss=loss) for i, loss in enumerate((1.0, None, 2.0))]
    truths = {"random_0": 0.9, "random_1": 0.1, "random_2": 0.5}
    assert with_truth(rows, truths)["val_loss"] == {
        "one_seed": pytest.approx(1), "one_seed_better_half": None, "1_seeds": pytest.approx(1)
    }  # fmt: skip


def test_the_better_half_is_told_apart_by_itself():
    """By hand: bad and good are in order, but among the good the order is reversed."""
    truths = {f"random_{i}": i / 10 for i in range(6)}
    rows = [row(f"random_{i}", 60, 0, value) for i, value in enumerate((0.1, 0.2, 0.3, 0.9, 0.8, 0.7))]
    found = with_truth(rows, truths)["val_top1"]
    assert found["one_seed_better_half"] == pytest.approx(-1)
    assert found["one_seed"] > 0.7


def test_truth_is_the_mean_of_the_longest_trainings():
    rows = [row("a_0", 540, 100, 0.0, 0.5), row("a_0", 540, 101, 0.0, 0.7), row("a_0", 60, 0, 0.0, 0.1)]
    assert truth_of(rows, 540) == {"a_0": pytest.approx(0.6)}


def test_the_best_rate_is_by_validation_accuracy_and_the_lowest_of_equals():
    of_rate = {0.1: (0.2, 0.6), 0.2: (0.5, 0.4), 0.4: (0.3, 0.6)}
    rows = [row("a_0", 60, seed, val, 1 - val, rate) for rate, of in of_rate.items() for seed, val in enumerate(of)]
    assert best_rates(rows) == {"a_0": 0.2}
    assert [one.val_top1 for one in at_best_rate(rows)] == [0.5, 0.4]
    tied = [row("a_0", 60, 0, 0.5, rate=rate) for rate in (0.4, 0.1, 0.2)]
    assert best_rates(tied) == {"a_0": 0.1}


def test_spread_takes_off_what_the_seeds_leave():
    """By hand, of two schemes and two seeds: means 0.6 and 0.8, variances 0.02 and 0; 0.02 - 0.01 / 2 is left."""
    rows = [row("random_0", 540, 100, 0.5), row("random_0", 540, 101, 0.7)]
    rows += [row("one_pass_0", 540, 100, 0.8), row("one_pass_0", 540, 101, 0.8)]
    found = spread(rows)
    assert found["between_seeds"] == pytest.approx(math.sqrt(0.01))
    assert found["between_schemes"] == pytest.approx(math.sqrt(0.02 - 0.01 / 2))
    of_random = dict.fromkeys(("mean", "best", "worst"), pytest.approx(0.6))
    assert found["kinds"]["random"] == {"schemes": 1, **of_random}
    assert list(found["kinds"]) == ["random", "one_pass"]


def test_schemes_that_differ_less_than_seeds_have_no_spread():
    rows = [row(f"random_{i}", 540, seed, value) for i in range(2) for seed, value in enumerate((0.1, 0.9))]
    assert spread(rows)["between_schemes"] == 0


@pytest.fixture
def drawn():
    """Trials of 40 random schemes whose truth is their number, and of one that is not drawn."""
    truths = {f"random_{i}": i / 100 for i in range(40)} | {"one_pass_0": 0.99}
    return truths, [row(name, 60, 0, value, loss=1 + value) for name, value in truths.items()]


def test_what_choosing_gains(drawn):
    """A measure that is the truth gains what the best of 20 of 40 has: (20 / 21) x 41 - 1 in the mean, less 19.5."""
    truths, rows = drawn
    found = chosen_by(rows, truths)
    assert found["candidates"] == 20
    expected = (20 / 21 * 41 - 1 - 19.5) / 100
    assert found["val_top1"] == pytest.approx(expected, abs=0.002)
    assert found["val_loss"] == pytest.approx(-expected, abs=0.002)  # which is the higher the better the scheme


def test_nothing_to_choose_from():
    assert chosen_by([row("random_0", 60, 0, 0.5)], {"random_0": 0.5}) == {}
    assert chosen_by([], {}) == {}


def test_the_ceiling_is_what_choosing_gains_in_another_seed(drawn):
    """Where all seeds agree that of the truth itself; where one is drawn anew, nothing is gained in it."""
    truths, _ = drawn
    rows = [row(name, 540, 100 + seed, truth) for name, truth in truths.items() for seed in range(2)]
    assert ceiling(rows) == pytest.approx((20 / 21 * 41 - 1 - 19.5) / 100, abs=0.002)
    assert ceiling([one for one in rows if one.seed == 100]) is None
    up = [row(f"random_{i}", 540, 100, i / 100) for i in range(40)]
    down = [row(f"random_{i}", 540, 101, 0.5 - i / 100) for i in range(40)]
    assert ceiling([*up, *down]) < -0.15


def test_all_figures(drawn):
    truths, _ = drawn
    names = list(truths)
    rows = [
        row(name, steps, seed, max(0, truths[name] + shift), rate=rate)
        for name in names
        for steps, rates in ((60, (0.1, 0.2)), (180, (0.1, 0.2)))
        for rate, shift in zip(rates, (0.0, -0.9 if name == "one_pass_0" else 0.01), strict=True)
        for seed in (0, 1)
    ]
    rows += [row(name, 540, 100 + seed, truths[name], rate=0.2) for name in names for seed in range(3)]
    found = figures_of(rows)
    assert (found["schemes"], found["longest_steps"]) == (41, 540)
    lengths = [(60, 0.1), (60, 0.2), (180, 0.1), (180, 0.2)]
    assert [(one["steps"], one["learning_rate"]) for one in found["retest"]] == [*lengths, (540, None)]
    assert [(one["steps"], one["learning_rate"]) for one in found["with_longest"]] == [
        *lengths,
        (60, None),
        (180, None),
    ]
    assert [one["val_top1"]["2_seeds"] > 0.99 for one in found["with_longest"]] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert len(found["chosen"]) == len(found["with_longest"])


def test_the_table_of_the_readme_is_that_of_the_committed_rows():
    recipes = Path(__file__).parents[3] / "recipes"
    found = figures_of(read_rows(recipes / "results/trials/trials.csv", TrialRow))
    text = (recipes / "studies/README.md").read_text()
    for one, chosen in zip(found["with_longest"], found["chosen"], strict=True):
        if one["learning_rate"] is None:
            continue
        (of_seeds,) = [
            of for of in found["retest"] if (of["steps"], of["learning_rate"]) == (one["steps"], one["learning_rate"])
        ]
        cells = [f"{one['steps']} steps, rate {one['learning_rate']:g}"]
        for name in ("val_top1", "val_loss"):
            cells += [f"{of_seeds[name]:.2f}", f"{one[name]['one_seed']:.2f}"]
            cells += [f"{one[name]['one_seed_better_half']:.2f}", f"{chosen[name] * 100:.1f}"]
        assert f"| {' | '.join(cells)} |" in text
