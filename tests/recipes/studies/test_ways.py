"""Ways to train: what the command line and files say is what is meant, and what is wrong is said."""

import json
from pathlib import Path

import pytest

from microtune.modules.search.short_training import Choice, Int8Update
from microtune.modules.user_error import UserError
from microtune.recipes.studies.ways import Way, load_ways

READY = sorted(Path("recipes/studies/ways").glob("*.json"))


@pytest.fixture
def file(tmp_path):
    """Writes ways into a file."""

    def write(ways):
        (tmp_path / "ways.json").write_text(ways if isinstance(ways, str) else json.dumps(ways))
        return tmp_path / "ways.json"

    return write


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        ("last_layers, biases", {"last_layers": Way("last_layers"), "biases": Way("biases")}),
        ("evolved=dir/a=b.json", {"evolved": Way("dir/a=b.json")}),
        ("a=with:colon.json:batch_size=1", {"a": Way("with:colon.json", batch_size=1)}),
        ("biases:learning_rate=0.05", {"biases": Way("biases", learning_rate=0.05)}),
        (
            "q=expanding:ratio=0.25:criterion=taylor:rechoose_every=25,full",
            {"q": Way("expanding", ratio=0.25, criterion="taylor", rechoose_every=25), "full": Way("full")},
        ),
        (
            "unscaled=full:numbers=int8:weight_storage=latent:gradient_scaling=false",
            {"unscaled": Way("full", numbers="int8", weight_storage="latent", gradient_scaling=False)},
        ),
        ("layers=accuracy:level=layer:evaluations=8", {"layers": Way("accuracy", level="layer", evaluations=8)}),
    ],
)
def test_words(words, ways):
    assert load_ways(words) == ways


def test_names_of_a_file_stand_for_its_ways(file):
    path = file({"a": {"scheme": "full"}, "b": {"numbers": "int8", "batch_size": 1}})
    assert load_ways(None, path, "s.json") == {"a": Way("full"), "b": Way("s.json", numbers="int8", batch_size=1)}
    assert load_ways("random,a", path) == {"random": Way("random"), "a": Way("full")}


def test_way_says_how_it_trains():
    way = Way("full", criterion="fisher", rechoose_every=9, choice_samples=8, weight_storage="latent")
    assert way.choice == Choice("fisher", 9, 8)
    assert way.int8_update == Int8Update("latent", True)


def test_ways_share_a_scheme_where_its_source_is_the_same():
    """What differs in training alone does not tell schemes apart."""
    way = Way("expanding", ratio=0.25)
    same = Way("expanding", ratio=0.25, criterion="taylor", rechoose_every=5, batch_size=1, numbers="fp32")
    assert way.source == same.source
    others = (Way("expanding"), Way("biases"), Way("expanding", ratio=0.25, deepest=9))
    assert len({way.source, *(other.source for other in others)}) == 4
    assert Way("accuracy").source != Way("accuracy", open_channels=True).source


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_ways_are_such(path):
    ways = load_ways(None, path, "scheme.json")
    assert len(ways) >= 5
    for way in ways.values():
        assert not way.scheme.startswith("recipes/") or Path(way.scheme).is_file()


def test_ready_ways_were_found():
    assert {path.stem for path in READY} >= {"channel_selection", "int8", "int8_published", "methods"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("best", "way 'best' is none: give name=FILE.json, or one of last_layers, biases, expanding, random, full"),
        ("scheme.json", "way 'scheme.json' is none"),
        ("evolved=", "way 'evolved=' is none"),
        ("=a.json", "the name '' would suit no table: give letters, digits and underscores"),
        ("../a=b.json", "way '../a=b.json' is none"),
        ("a=b.json,a=c.json", "two ways have the name a: give each its own"),
        ("biases,biases:learning_rate=1", "two ways have the name biases: give each its own"),
        (" ,", "there is nothing to compare: give --ways such as evolved=scheme.json,last_layers,biases"),
        (None, "there is nothing to compare"),
        ("biases:rate=0.1", "biases has the unknown field 'rate': give some of scheme, ratio, deepest"),
        ("biases:learning_rate=fast", "biases: learning_rate is 'fast': it should be a valid number"),
        ("biases:learning_rate=0", "biases: learning_rate is '0': it should be greater than 0"),
        ("biases:learning_rate=inf", "biases: learning_rate is 'inf': it should be a finite number"),
        ("q=expanding:ratio=2", "q: ratio is '2': it should be less than or equal to 1"),
        ("q=expanding:criterion=best", "q: criterion is 'best': it should be 'weight_norm', 'gradient_norm', 'fisher'"),
        ("a=full:batch_size=0", "a: batch_size is '0': it should be greater than or equal to 1"),
        ("biases:ratio=0.5", "way biases: ratio is of the scheme expanding, not biases: leave it out"),
        ("full:evaluations=3", "way full: evaluations is of the scheme accuracy, not full: leave it out"),
        ("random:deepest=3", "way random: deepest is of the scheme last_layers or biases or expanding, not random"),
        ("full:numbers=fp32:weight_storage=latent", "way full: weight_storage and gradient_scaling are of an int8"),
        ("full,biases:rate_of=best", "way biases: rate_of is 'best': give a way with a rate of its own, one of full"),
        ("full:rate_of=full", "way full: rate_of is 'full': give a way with a rate of its own"),
        ("full,biases:rate_of=full:learning_rate=1", "way biases has learning_rate and rate_of: leave one of them out"),
    ],
)
def test_mistakes_in_words(words, message):
    with pytest.raises(UserError) as refused:
        load_ways(words)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ("{", "ways.json: not valid JSON: "),
        ([], "ways.json: this is no list of ways: give an object from a name to its fields"),
        ({"a-b": {}}, "ways.json: the name 'a-b' would suit no table"),
        ({"a": {"scheme": "full", "ratoi": 1}}, "ways.json: a has the unknown field 'ratoi'"),
        ({"a": {"numbers": "fp32"}}, "way a has no scheme: give it one, or --scheme for all that have none"),
    ],
)
def test_mistakes_in_a_file(ways, message, file):
    with pytest.raises(UserError) as refused:
        load_ways(None, file(ways))
    assert message in str(refused.value)


def test_file_that_is_not_there():
    with pytest.raises(UserError, match=r"nowhere\.json: cannot read the list of ways: No such file or directory"):
        load_ways(None, "nowhere.json")
