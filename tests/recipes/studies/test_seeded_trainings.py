"""Trainings of a study: each is known by what it does and done once; learning rates are chosen by validation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies import seeded_trainings
from microtune.recipes.studies.seeded_trainings import (
    MOST_HALVINGS,
    MOST_RATES,
    Case,
    Training,
    best_rates,
    train_all,
    train_once,
    train_until_none_diverges,
)
from microtune.recipes.studies.ways import Way

CASE = Case("digits", "fp32", "extra64", "biases")


@pytest.fixture
def training():
    settings = TrialSettings("digits", base_depth=3, steps=2, batch_size=16, resolution=32, features="none")
    scheme = UpdateScheme("mobilenet_v2-w0.35", 1, provenance={"rule": "the last bias"})
    return Training(CASE, Way("biases"), 0, settings, scheme.to_dict(), 0.1)


def called(training, name):
    """The same training by another name."""
    return replace(training, case=replace(CASE, way=name))


def pretended(monkeypatch, val_top1):
    """Lets trainings only pretend: ``val_top1`` gives what comes out, or None of one that is lost."""

    def train(training, path):
        top1 = val_top1(training)
        if top1 is not None:
            found = {split: top1 if split == "val" else 1 - top1 for split in training.splits}
            Path(path).write_text(json.dumps({"top1": found, "loss": 1.0, "seconds": 1}))

    monkeypatch.setattr(seeded_trainings, "train_once", train)


def test_a_training_is_known_by_what_it_does(training):
    """Not by what it is called, how its scheme came about, or where its data and features lie."""
    settings = training.settings
    same = [
        called(training, "layers"),
        replace(training, way=Way("full"), is_rate_chosen=True, facts={"bias_depth": 1}),
        replace(training, scheme=training.scheme | {"provenance": {}}),
        replace(training, settings=replace(settings, features="memory", features_limit_mib=1.0, data_dir="moved")),
    ]
    others = [
        replace(training, seed=1),
        replace(training, as_recipe=True),
        replace(training, learning_rate=0.2),
        replace(training, warmup_fraction=0.2),
        replace(training, way=Way("biases", criterion="taylor")),
        replace(training, way=Way("biases", rechoose_every=5)),
        replace(training, way=Way("biases", weight_storage="latent")),
        replace(training, way=Way("biases", gradient_scaling=False)),
        replace(training, splits=("val",)),
        replace(training, scheme=training.scheme | {"bias_depth": 2}),
        replace(training, settings=replace(settings, steps=3)),
        replace(training, settings=replace(settings, copies=3)),
    ]
    assert {one.key for one in same} == {training.key}
    assert len({one.key for one in [training, *others]}) == 1 + len(others)


def test_what_a_training_leaves_behind(training, tmp_path):
    train_once(training, str(tmp_path / "a.json"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["training"] == "biases in fp32 within extra64 on digits, seed 0"
    assert set(found["top1"]) == {"val", "test"}
    assert found["loss"] > 0
    # a loss that is no number is none
    train_once(replace(training, learning_rate=1e38, seed=1), str(tmp_path / "b.json"))
    assert json.loads((tmp_path / "b.json").read_text())["loss"] is None


def test_equal_trainings_are_done_once(training, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(seeded_trainings, "train_once", lambda _, path: (trained.append(path), Path(path).touch()))
    trainings = [training, called(training, "last_layers"), replace(training, seed=1)]
    with Workers(1) as workers:
        train_all(trainings, workers, tmp_path, "trainings")
        train_all(trainings, workers, tmp_path, "trainings")
    assert trained == [str(training.file(tmp_path)), str(trainings[2].file(tmp_path))]


def test_best_rate_is_that_of_the_validation_split(training, tmp_path, monkeypatch):
    """Of equally good ones the smallest; a group whose every training is lost has none."""
    accuracies = {("biases", 0.1): 0.5, ("biases", 0.2): 0.7, ("biases", 0.4): 0.7, ("layers", 0.1): 0.9}

    def of(training):
        assert (training.seed, training.splits) == (7, ("val",))
        return accuracies.get((training.case.way, training.learning_rate))

    pretended(monkeypatch, of)
    layers = replace(called(training, "layers"), scheme=training.scheme | {"bias_depth": 2})
    lost = replace(called(training, "full"), scheme=training.scheme | {"bias_depth": 3})
    tried = {one.case: one for one in (training, layers, lost)}
    with Workers(1) as workers:
        rates = best_rates(tried, {case: [0.4, 0.1, 0.2] for case in tried}, 7, workers, tmp_path)
    assert rates == {training.case: 0.2, layers.case: 0.1}
    assert training.result(tmp_path) is None


@pytest.mark.parametrize(("best", "tried"), [(0.05, [0.025, 0.05, 0.1, 0.2]), (0.4, [0.1, 0.2, 0.4, 0.8])])
def test_rates_are_tried_until_the_best_has_a_worse_one_on_either_side(best, tried, training, tmp_path, monkeypatch):
    pretended(monkeypatch, lambda one: 1 - abs(math.log(one.learning_rate / best)) / 10)
    with Workers(1) as workers:
        rates = best_rates({CASE: training}, {CASE: [0.1, 0.2]}, 7, workers, tmp_path)
    assert rates == {CASE: pytest.approx(best)}
    assert len(list((tmp_path / "trainings").iterdir())) == len(tried)


def test_rates_that_only_ever_rise_end_somewhere(training, tmp_path, monkeypatch):
    pretended(monkeypatch, lambda one: 1 - 1 / (1 + one.learning_rate))
    with Workers(1) as workers:
        rates = best_rates({CASE: training}, {CASE: [0.1, 0.2]}, 7, workers, tmp_path)
    assert rates == {CASE: pytest.approx(0.1 * 2 ** (MOST_RATES - 1))}


def test_what_diverges_is_trained_anew_at_half_the_rate(training, tmp_path, monkeypatch):
    """All seeds of that budget alone; by validation accuracy, not without end, and at no rate that was given."""
    budgets = ("tight", "loose", "hopeless", "given")
    trainings = [
        replace(
            training, case=replace(CASE, budget=budget), scheme=training.scheme | {"bias_depth": depth}, seed=seed,
            is_rate_chosen=budget != "given",
        )
        for depth, budget in enumerate(budgets)
        for seed in (0, 1)
    ]  # fmt: skip

    def of(training):
        # one seed of the loose budget bears no more than a quarter of the rate, the other all of it
        limits = {"tight": 1.0, "loose": 0.025 if training.seed else 1.0, "hopeless": 0.0, "given": 0.0}
        return 0.8 if training.learning_rate <= limits[training.case.budget] else 0.1

    pretended(monkeypatch, of)
    with Workers(1) as workers:
        trained = train_until_none_diverges(trainings, workers, tmp_path)
    hopeless = 0.1 / 2**MOST_HALVINGS
    expected = [0.1, 0.1, 0.025, 0.025, hopeless, hopeless, 0.1, 0.1]
    assert [one.learning_rate for one in trained] == pytest.approx(expected)
    assert all(one.result(tmp_path) is not None for one in trained)
