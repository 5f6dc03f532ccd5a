"""A study's search is the recipe's, and goes on where it was stopped."""

import json
from dataclasses import replace

import pytest

from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.options import Effort, TrialSettings
from microtune.recipes.studies.scheme_search import SchemeSearch, search_once


@pytest.fixture
def search(tmp_path):
    settings = TrialSettings("digits", resolution=32, base_depth=6, batch_size=16, learning_rate=0.1, features="none")
    return SchemeSearch(settings, "extra16", tmp_path / "search")


@pytest.mark.parametrize("within", ["extra16", "stm32f746"])
def test_search_is_that_of_the_recipe(search, within, command, tmp_path):
    """By the arguments that the scheme's provenance has."""
    search = replace(search, budget=within, effort=Effort(seed=3))
    assert search_once(search) is None
    given = {name: value for name, value in search.arguments.items() if value not in (None, {})}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    ended = command("evolve_update_scheme", *words, "--logger", "none", "--out_dir", tmp_path / "recipe")
    assert ended.status == 0, ended.errors
    ours, recipes = (UpdateScheme.load(tmp_path / name / "scheme.json") for name in ("search", "recipe"))
    assert replace(ours, provenance={}) == replace(recipes, provenance={})
    assert ours.bias_depth
    assert json.loads(search.report_file.read_text())["seconds"] > 0


def test_search_goes_on_and_one_that_had_not_begun_begins(search):
    """A folder that was made, and nothing in it that says of what: a kill at the wrong moment."""
    (search.folder / "metrics").mkdir(parents=True)
    assert search_once(search) is None
    assert not (search.folder / "metrics").exists()
    search.report_file.unlink()
    found = (search.folder / "scheme.json").read_bytes()
    assert search_once(search) is None
    assert UpdateScheme.load(search.folder / "scheme.json").weights == UpdateScheme.from_dict(json.loads(found)).weights


def test_search_that_fails_says_so(search):
    failure = search_once(replace(search, budget="extra0.01"))
    assert failure.startswith("search: budget_bytes is 10 of extra memory")
    assert not search.report_file.exists()


def test_search_by_accuracy_trains_schemes(search):
    effort = Effort("accuracy", evaluations=3, finalists=0)
    by_accuracy = replace(search, effort=effort, level="layer", settings=replace(search.settings, steps=2))
    assert search_once(by_accuracy) is None
    report = json.loads(search.report_file.read_text())
    assert (report["fitness"], report["level"], report["evaluations"]) == ("accuracy", "layer", 3)
    scheme = UpdateScheme.load(search.folder / "scheme.json")
    assert set(scheme.weights.values()) <= {1.0}
