"""The finalists: trained with seeds of their own, the best first, and ranks as SciPy's."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.finalists import rank_correlation, train_finalists
from microtune.recipes.search.options import TrialSettings

PROBLEM = SimpleNamespace(
    scheme=lambda genome: UpdateScheme("network", genome[0]),
    score=lambda genome: genome[0] / 100,
    memory_bytes=lambda genome: 1000.0 * genome[0],
)
PROXIES = {(3,): 0.5, (1,): 0.4, (2,): 0.3}


def train(accuracy, seeds=2, settings=None):
    """The winner, the report and the calls, where a scheme has the accuracy that the function gives."""
    calls = []

    def map_in_place(function, settings, schemes, seeds_of_each, steps, judged_by, rates):
        calls.append((settings[0], seeds_of_each[0]))
        return [accuracy(scheme["bias_depth"], seeds_of_each[0][0]) for scheme in schemes]

    workers = SimpleNamespace(map=map_in_place)
    winner, report = train_finalists(PROBLEM, PROXIES, settings or TrialSettings("digits"), 400, seeds, workers)
    return winner, report, calls


def test_the_best_mean_wins():
    """By hand: the means of depths 3, 1 and 2 are 0.5, 0.7 and 0.6."""
    values = {3: (0.9, 0.1), 1: (0.6, 0.8), 2: (0.6, 0.6)}
    winner, report, calls = train(lambda depth, seed: values[depth][seed % 2])
    assert winner == (1,)
    assert [one["genome"] for one in report["finalists"]] == [[1], [2], [3]]
    assert [one["val_top1_mean"] for one in report["finalists"]] == pytest.approx([0.7, 0.6, 0.5])
    assert [one["val_top1_std"] for one in report["finalists"]] == pytest.approx([0.02**0.5, 0.0, 0.32**0.5])
    assert [one["proxy"] for one in report["finalists"]] == [0.4, 0.3, 0.5]
    assert [one["table_score"] for one in report["finalists"]] == [0.01, 0.02, 0.03]
    assert [one["memory_bytes"] for one in report["finalists"]] == [1000.0, 2000.0, 3000.0]
    assert report["rank_correlation"] == pytest.approx(-0.5)
    assert [settings.steps for settings, _ in calls] == [400, 400]
    assert len({seeds for _, seeds in calls}) == 2


def test_one_seed_has_no_deviation():
    _, report, _ = train(lambda depth, seed: depth / 10, seeds=1)
    assert {one["val_top1_std"] for one in report["finalists"]} == {0.0}


def test_features_of_longer_trainings_are_kept_apart():
    """They see other augmented copies."""
    trial = TrialSettings("digits", features="disk", features_dir="kept")
    _, _, calls = train(lambda depth, seed: 0.1, settings=trial)
    assert {settings.features_dir for settings, _ in calls}.isdisjoint({"kept", None})


def test_a_lost_training_leaves_the_others():
    winner, report, _ = train(lambda depth, seed: None if (depth, seed % 2) == (1, 0) or depth == 2 else depth / 10)
    assert winner == (3,)
    assert [(one["genome"], one["val_top1_mean"]) for one in report["finalists"]] == [([3], 0.3), ([1], 0.1)]


def test_all_lost():
    with pytest.raises(UserError, match="every training of a finalist was lost with its worker: the warnings above"):
        train(lambda depth, seed: None)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 25]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / (4 * 15))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_rank_correlation_is_scipys_or_none(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = rank_correlation(first, second)
    if len(pairs) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic)
