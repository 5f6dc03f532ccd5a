"""The comparison of searches: the same steps and trainings for all of them, each once, its rows, and clear errors."""

import json
from pathlib import Path

import pytest
from PIL import Image

from microtune.modules.csv_rows import read_rows
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.studies import compare_searches, seeded_trainings
from microtune.recipes.studies.compare_searches import FINAL_SEED, FINAL_SEEDS_APART, RATE_SEED
from microtune.recipes.studies.paired_differences import compare_all
from microtune.recipes.studies.result_rows import Result, title_of

RECIPE = "compare_searches"
TASK = {"data": "digits", "weights": "none", "data_options": {"classes": [0, 1]}, "resolution": 32}
SEARCHED = ("evolution", "random_halving", "one_pass")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def words(tmp_path_factory, small_table):
    """Of a comparison of some seconds."""
    path = tmp_path_factory.mktemp("tasks") / "data_sets.json"
    ones = TASK | {"learning_rates": [0.1, 0.4], "contributions": str(small_table)}
    path.write_text(json.dumps({"ones": ones, "twos": TASK | {"learning_rates": [0.1]}}))
    return ("--data_sets", path, "--only", "ones", "--budgets", "extra10", "--base_depth", 25, "--rungs", "1,2",
            "--total_steps", 14, "--final_steps", 3, "--final_seeds", 2, "--seeds", 1)  # fmt: skip


@pytest.fixture
def done(monkeypatch):
    """The searches and trainings that are really done."""
    found = {"search_once": [], "train_once": []}
    for module, name in ((compare_searches, "search_once"), (seeded_trainings, "train_once")):
        original, kept = getattr(module, name), found[name]
        monkeypatch.setattr(module, name, lambda *of, do=original, kept=kept: (kept.append(of[0]), do(*of))[1])
    return found


def test_comparison(words, command, done, tmp_path):
    arms = ",".join([*SEARCHED, "table_optimum", "published"])
    ended = command(RECIPE, *words, "--arms", arms, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    assert len(done["search_once"]) == len(SEARCHED)
    rows = read_rows(tmp_path / "out/searches.csv", Result)
    assert [(row.way, row.seed) for row in rows] == [(arm, 0) for arm in (*SEARCHED, "table_optimum")]  # of any size
    assert {(row.steps, row.learning_rate in (0.1, 0.4)) for row in rows} == {(3, True)}
    trained = {(one.seed, one.settings.steps, one.splits) for one in done["train_once"]}
    of_finals = {(FINAL_SEED + apart, 3, ("val", "test")) for apart in (0, FINAL_SEEDS_APART)}
    assert trained == {(RATE_SEED, 1, ("val",))} | of_finals
    for row in rows:
        own = [one for one in done["train_once"] if one.case.way == row.way]
        top1 = [one.result(tmp_path / "out")["top1"]["test"] for one in own if one.settings.steps == 3]
        if top1:  # not of a scheme that another arm has too
            assert row.top1 == pytest.approx(sum(top1) / 2)

    # the same steps for all that train, none for what does not
    report = json.loads((tmp_path / "out/report.json").read_text())
    steps = {one["arm"]: one["steps"] for one in report["costs"]}
    assert steps["one_pass"] == 0
    assert {steps[arm] for arm in ("evolution", "random_halving")} == {14}
    (comparison,) = report["comparisons"]
    assert [one["way"] for one in comparison["ways"]] == [*SEARCHED, "table_optimum"]
    top1 = {row.way: row.top1 for row in rows}
    assert comparison["ways"][2]["difference"] == pytest.approx(top1["evolution"] - top1["one_pass"])
    assert "Top-1 on the test split: " in ended.output
    assert "What a search takes, means over seeds" in ended.output
    with Image.open(tmp_path / "out/comparison.png") as picture:
        assert (picture.format, min(picture.size) > 300) == ("PNG", True)

    # given again it does nothing anew; with more seeds, or another data set, what there is stays
    for kept in done.values():
        kept.clear()
    again = command(RECIPE, *words, "--arms", arms, "--out_dir", tmp_path / "out")
    assert again.output == ended.output
    assert done == {"search_once": [], "train_once": []}
    more = ("--arms", "one_pass", "--seeds", 2, "--out_dir", tmp_path / "out")
    assert command(RECIPE, *words, *more).status == 0
    assert command(RECIPE, *words, *more, "--only", "twos").status == 0
    assert [one.effort.seed for one in done["search_once"]] == [1, 0, 1]
    kept = read_rows(tmp_path / "out/searches.csv", Result)
    assert set(rows) < set(kept)
    assert len(kept) == len(rows) + 1 + 2


def test_evolution_at_what_the_published_scheme_takes(words, command, tmp_path):
    arms = ("--arms", "one_pass,published", "--budgets", "published", "--seeds", 1)
    assert command(RECIPE, *words, *arms, "--out_dir", tmp_path / "out").status == 0
    rows = {row.way: row for row in read_rows(tmp_path / "out/searches.csv", Result)}
    published = rows["published"]
    assert rows["one_pass"].extra_memory_bytes <= published.extra_memory_bytes
    assert published.budget == rows["one_pass"].budget == f"extra{published.extra_memory_bytes / 1024:.6f}"
    scheme = UpdateScheme.load(compare_searches.PAPERS_SCHEME)
    assert (published.bias_depth, published.updated_layers) == (scheme.bias_depth, len(scheme.weights))


def test_the_rate_with_the_lowest_loss_is_taken(words, command, tmp_path, monkeypatch):
    """One whose loss is no number never is."""

    def trained(training, path):
        loss = {0.1: 2.0, 0.4: None if training.seed == RATE_SEED else 1.0}[training.learning_rate]
        top1 = dict.fromkeys(training.splits, 0.5)
        found = {"top1": top1, "cross_entropy": dict.fromkeys(training.splits, loss), "loss": 1.0, "seconds": 1.0}
        compare_searches.write_json(path, found)

    monkeypatch.setattr(seeded_trainings, "train_once", trained)
    assert command(RECIPE, *words, "--arms", "one_pass", "--seeds", 2, "--out_dir", tmp_path / "out").status == 0
    rows = read_rows(tmp_path / "out/searches.csv", Result)
    assert {row.seed: row.learning_rate for row in rows} == {0: 0.1, 1: 0.4}


def test_a_search_that_failed_is_told(words, command, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compare_searches, "search_once", lambda search: f"{search.folder.name}: it went wrong")
    ended = command(RECIPE, *words, "--arms", "one_pass,table_optimum", "--out_dir", tmp_path / "out")
    assert ended.status == 0
    assert "ones-fp32-extra10-one_pass-seed0: it went wrong" in caplog.text
    assert "missing" in ended.output
    assert {row.way for row in read_rows(tmp_path / "out/searches.csv", Result)} == {"table_optimum"}


def test_the_table_of_the_readme_is_that_of_the_committed_rows():
    recipes = Path(__file__).parents[3] / "recipes"
    rows = read_rows(recipes / "results/searches/searches.csv", Result)
    text = (recipes / "studies/README.md").read_text()
    comparisons = compare_all(rows, [(arm, "fp32") for arm in SEARCHED])
    assert {one["data"] for one in comparisons} == {"cifar10", "flowers17", "mswc_arabic", "speech_commands"}
    for comparison in comparisons:
        evolution, *others = comparison["ways"]
        cells = [title_of(comparison["data"]), str(len(evolution["top1"]))]
        cells += [f"{one['top1_mean'] * 100:.1f} ± {one['top1_std'] * 100:.1f}" for one in comparison["ways"]]
        for one in others:
            low, high = (limit * 100 for limit in one["interval"])
            cells.append(f"{one['difference'] * 100:+.1f} ({low:.1f} to {high:.1f})")
        assert f"| {' | '.join(cells)} |" in text


MISTAKES = {
    "arms": (("--arms", "evolution,luck"), "arms has 'luck': give some of evolution, evolution_layers, random_halving"),
    "no budget": (
        ("--budgets", "none"),
        "schemes are searched within a budget: give one with --budgets, such as extra",
    ),
    "unknown budget": (("--budgets", "z80"), "budget is 'z80': give KiB of extra memory such as extra64"),
    "final steps": (("--final_steps", 2), "final_steps is 2: give 3 or more"),
    "final seeds": (("--final_seeds", 0), "final_seeds is 0: give 1 or more"),
    "seeds": (("--seeds", 0), "seeds is 0: give 1 or more"),
    "rungs": (("--rungs", "180,60"), "rungs is 180,60: give numbers of steps, each more than the one before"),
    "steps": (("--total_steps", 0), "total_steps is 0: give 1 or more"),
    "too shallow": (("--base_depth", 12, "--budgets", "published"), "base_depth is 12, but the published scheme reach"),
    "unknown data set": (("--only", "tens"), "has no data set 'tens': it has ones, twos"),
    "no int8 network": (("--numbers", "int8"), "there is no int8 network for digits: give it, or leave int8 out"),
    "missing list": (("--data_sets", "nowhere.json"), "nowhere.json: cannot read the list of data sets"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, words, command, tmp_path):
    wrong, message = MISTAKES[mistake]
    ended = command(RECIPE, *words, *wrong, "--out_dir", tmp_path / "out")
    assert (ended.status, ended.output) == (2, "")
    assert message in ended.errors
    assert not (tmp_path / "out").exists()
