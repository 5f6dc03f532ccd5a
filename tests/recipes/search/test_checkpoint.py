"""The state of a search: kept whole, random numbers too."""

import random

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState

STATE = SearchState(
    generation=2,
    population=[(3, 0, 1), (0, 0, 0)],
    fitness={(3, 0, 1): (0.1 + 0.2, 0.7), (2, 1, 0): (None,), (0, 0, 0): (-1e-17,)},
    history=[{"generation": 1, "best": 0.1}, {"generation": 2, "best": 0.1 + 0.2}],
)


def test_what_was_saved_is_loaded(tmp_path):
    random.seed(5)
    random.gauss(0, 1)  # which keeps a second number for the next call
    STATE.save(tmp_path / "search.json")
    expected = [random.random(), random.gauss(0, 1), random.choice("abc")]
    loaded = SearchState.load(tmp_path / "search.json")
    fields = ("generation", "population", "fitness", "history")
    assert {name: getattr(loaded, name) for name in fields} == {name: getattr(STATE, name) for name in fields}
    assert list(loaded.fitness) == list(STATE.fitness)  # in the order of evaluation
    random.seed(6)
    random.setstate(loaded.random_state)
    assert [random.random(), random.gauss(0, 1), random.choice("abc")] == expected


def test_a_search_that_has_not_begun(tmp_path):
    assert SearchState.load(tmp_path / "search.json") == SearchState()


def test_saving_draws_no_random_number_and_leaves_one_file(tmp_path):
    random.seed(5)
    STATE.save(tmp_path / "search.json")
    STATE.save(tmp_path / "search.json")
    assert random.random() == random.Random(5).random()
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[1]", b'"text"', b"{}", b"\0\xff", b'{"random_state": [3, [1], null]}'),
        b'{"generation": 1, "population": 5, "fitness": [], "history": [], "random_state": [3, [1], null]}',
        b'{"generation": 1, "population": [], "fitness": [5], "history": [], "random_state": [3, [1], null]}',
    ],
)
def test_damaged(content, tmp_path):
    path = tmp_path / "search.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        SearchState.load(path)
    assert str(error.value) == f"{path} cannot be read, it was damaged: remove it to begin the search again"
