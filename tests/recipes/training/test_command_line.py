"""A typed function as a command line."""

import sys
from pathlib import Path
from typing import Literal

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import check_at_least_one, run_recipe


def recipe(size: int = 3, ratio: float = 0.5, out_dir: Path | None = None, json: bool = False, full: bool = False):
    """A recipe.

    Args:
        size: How many.
        ratio: How much.
        out_dir: Where.
        json: Whether as JSON.
        full: Whether whole.
    """
    if size == 13:
        raise UserError("size 13 brings bad luck: give another")
    if size == 16:
        traceback = (
            "Original Traceback (most recent call last):\n  File ...\nmicrotune.modules.user_error.UserError: a.jpg"
        )
        raise UserError(f"Caught UserError in DataLoader worker process 0.\n{traceback} is no image\n")
    if size == 14:
        raise KeyboardInterrupt
    if size == 15:
        raise RuntimeError("a mistake of ours")
    return size, ratio, out_dir, json, full


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["folder/recipe.py", *words])
    return run_recipe(recipe)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], (3, 0.5, None, False, False)),
        (["--size", "4", "--ratio=0.25"], (4, 0.25, None, False, False)),
        (["--out_dir", "runs/x"], (3, 0.5, Path("runs/x"), False, False)),
        (["--json"], (3, 0.5, None, True, False)),
        (["--json", "true"], (3, 0.5, None, True, False)),
        (["--json=true"], (3, 0.5, None, True, False)),
        (["--json", "false"], (3, 0.5, None, False, False)),
        (["--json", "--full", "--size", "1"], (1, 0.5, None, True, True)),
        (["--size", "1", "--full", "--json"], (1, 0.5, None, True, True)),
    ],
)
def test_words_become_arguments(words, arguments, monkeypatch):
    assert called(monkeypatch, *words) == arguments


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--size", "13"], "recipe.py: error: size 13 brings bad luck: give another\n"),
        (["--size", "16"], "recipe.py: error: a.jpg is no image\n"),
        (["--siz", "4"], "recipe.py: error: unrecognized arguments: --siz 4; --help lists the options\n"),
        (["--json", "perhaps"], None),
        (["--size"], None),
    ],
)
def test_mistake_is_one_line_and_status_2(words, line, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, *words)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith("recipe.py: error: ")
    assert printed.err.count("\n") == 1
    assert line in (None, printed.err)


def test_interruption(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "--size", "14")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command starts anew\n"


def test_mistake_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        called(monkeypatch, "--size", "15")


def test_help_has_the_docstring(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "A recipe." in printed
    assert "How many." in printed


def test_configuration_file_and_what_stands_beside_it(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("size: 7\nout_dir: null\nfull: true\n")
    config = str(tmp_path / "config.yaml")
    assert called(monkeypatch, "--config", config) == (7, 0.5, None, False, True)
    assert called(monkeypatch, "--config", config, "--size", "8") == (8, 0.5, None, False, True)


def test_literal_is_checked(monkeypatch, capsys):
    def choose(kind: Literal["a", "b"] = "a"):
        return kind

    monkeypatch.setattr(sys, "argv", ["choose.py", "--kind", "c"])
    with pytest.raises(SystemExit) as ended:
        run_recipe(choose)
    assert ended.value.code == 2
    assert "kind" in capsys.readouterr().err


def test_check_at_least_one():
    check_at_least_one(rounds=1, threads=None)
    with pytest.raises(UserError, match="threads is 0: give 1 or more"):
        check_at_least_one(rounds=1, threads=0)
