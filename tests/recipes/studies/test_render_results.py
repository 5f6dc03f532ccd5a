"""Tables and pictures from CSV: everything is made, and nothing else of the README changes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest

from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies.render_results import (
    load_schemes,
    main,
    results_in_markdown,
    scheme_files,
)
from microtune.recipes.studies.result_rows import Result

ROOT = Path(__file__).parents[3]
BASE = Result(
    "cifar10", "fp32", "biases", "extra64", "weight_norm", 0, 0, 0.8, None, 61440.0, 171930.0, 47, 0, 0, 0.05, 1830,
    32, 0.0, 71.5,
)  # fmt: skip
CHOSEN = replace(BASE, way="weight_norm", extra_memory_bytes=61747.0, steps=366, learning_rate=0.006)
SCHEME = UpdateScheme("mobilenet_v2-w0.35", 12, {"features.16.conv.0.0": 0.5})
NAME = "cifar10-extra64-sub_tensor"


@pytest.fixture
def files(tmp_path):
    """Two CSV files with a row each, and a scheme where it is looked for."""
    write_rows(tmp_path / "results.csv", [BASE], Result)
    write_rows(tmp_path / "selection.csv", [CHOSEN], Result)
    SCHEME.save(tmp_path / f"out/schemes/{NAME}.json")
    return tmp_path


def test_everything_is_made(files, command):
    words = ("--results", files / "results.csv", "--out_dir", files / "out", "--selection", files / "selection.csv")
    ended = command("render_results", *words)
    assert (ended.status, ended.errors) == (0, "")
    pictures = ["accuracy_over_memory_cifar10.png", "channel_selection_cifar10.png", "updated_channels_cifar10.png"]
    assert sorted(path.name for path in (files / "out").iterdir()) == sorted([*pictures, "results.md", "schemes"])
    page = (files / "out/results.md").read_text()
    tables = results_in_markdown([BASE], [CHOSEN])
    assert all(f"]({picture})" in page for picture in pictures)
    assert page.startswith("## Results\n\nTop-1 on the test split")
    assert [line for line in page.splitlines() if line.startswith("|")] == [
        line for line in tables.splitlines() if line.startswith("|")
    ]
    assert "| biases only | **80.0** | - | - | - |" in page
    assert "| weight norm, static | **80.0** |  |" in page
    assert "missing: fp32 biases at extra64 on cifar10, seeds 1, 2\n" in ended.output
    assert ended.output.endswith("missing: mswc_arabic, all rows\n")


def test_made_again_it_is_the_same(files):
    arguments = {"results": files / "results.csv", "out_dir": files / "out"}
    main(**arguments)
    first = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    main(**arguments)
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == first


def test_no_row_is_missing(files, command, monkeypatch):
    monkeypatch.setattr("microtune.recipes.studies.render_results.missing_rows", lambda rows: [])
    ended = command("render_results", "--results", files / "results.csv", "--out_dir", files / "out")
    assert ended.output.splitlines()[-1] == "no row is missing"


def test_selection_tells_what_is_missing(files, command):
    rows = [CHOSEN, replace(CHOSEN, seed=1), replace(CHOSEN, way="fisher", criterion="fisher")]
    write_rows(files / "selection.csv", rows, Result)
    ended = command(
        *("render_results", "--results", files / "results.csv", "--out_dir", files / "out"),
        *("--selection", files / "selection.csv"),
    )
    assert ended.output.splitlines()[-1] == "missing: fisher, static at extra64 on cifar10, seed 1"


def test_schemes_of_the_command_line_take_the_place_of_the_folder(files, command):
    SCHEME.save(files / "mine.json")
    words = ("--results", files / "results.csv", "--out_dir", files / "out", "--schemes")
    assert command("render_results", *words, f"flowers17-extra100-one_pass={files / 'mine.json'}").status == 0
    assert [path.name for path in (files / "out").glob("updated*")] == ["updated_channels_flowers17.png"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--results", "nowhere.csv"], "nowhere.csv: the file cannot be read: No such file or directory"),
        (["--results", "empty.csv"], "empty.csv has no rows: give the results of at least one training"),
        (["--selection", "results.csv"], "results.csv: line 2: way is 'biases': that is no choice of channels"),
        (["--results", "selection.csv"], "selection.csv: line 2: way is 'weight_norm': the tables are of full, last_"),
        (["--schemes", f"{NAME}=nowhere.json"], "nowhere.json: cannot read the update scheme"),
    ],
)
def test_mistakes_leave_everything_as_it_was(words, error, files, command, monkeypatch):
    monkeypatch.chdir(files)
    write_rows("empty.csv", [], Result)
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    arguments = {"--results": "results.csv", "--out_dir": "out"} | {words[0]: words[1]}
    ended = command("render_results", *(word for pair in arguments.items() for word in pair))
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.startswith(f"render_results.py: error: {error}")
    assert ended.errors.count("\n") == 1
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_pytorch_is_not_imported_without_schemes(tmp_path):
    script = "import sys, microtune.recipes.studies.render_results; assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# ---- schemes by name


def test_scheme_files(tmp_path):
    assert scheme_files("a=b.json, c=d=e.json", tmp_path) == {"a": Path("b.json"), "c": Path("d=e.json")}
    assert scheme_files(None, tmp_path / "nowhere") == {}
    for name in (f"{NAME}.json", "cifar10-extra64-biases.json", "cifar10-extra64-sub_tensor-int8.json", "notes.txt"):
        (tmp_path / name).touch()
    assert scheme_files(None, tmp_path) == {NAME: tmp_path / f"{NAME}.json"}  # those that were searched for


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"way": "best"}, "line 3: way is 'best': the tables are of full, last_layers"),
        ({"budget": "none"}, "line 3: budget is 'none': the tables have extra64, extra100"),
        ({"way": "full"}, "line 3: budget is 'extra64': the tables have none of full"),
        (
            {"seed": 1, "steps": 7},
            "line 3: cifar10 was trained for 7 steps of 32 samples, in line 2 for 1830 of 32: give every way the same "
            "budget of steps",
        ),
        ({"seed": 1, "batch_size": 8}, "line 3: cifar10 was trained for 1830 steps of 8 samples, in line 2 for 1830"),
    ],
)
def test_rows_that_the_tables_have_no_place_for(changes, error, files):
    write_rows(files / "results.csv", [BASE, replace(BASE, **changes)], Result)
    with pytest.raises(UserError) as refused:
        main(files / "results.csv", files / "out")
    assert str(refused.value).startswith(f"{files / 'results.csv'}: {error}")
    assert not (files / "out/results.md").exists()


@pytest.mark.parametrize(
    ("schemes", "error"),
    [
        (
            "scheme.json",
            "schemes has 'scheme.json': give each as name=file, such as cifar10-extra64-layers=scheme.json",
        ),
        ("=scheme.json", "schemes has '=scheme.json': give each as name=file"),
        ("a=", "schemes has 'a=': give each as name=file"),
        ("a=b,a=c", "schemes has a twice: keep one"),
    ],
)
def test_schemes_that_are_no_names_and_files(schemes, error, tmp_path):
    with pytest.raises(UserError) as caught:
        scheme_files(schemes, tmp_path)
    assert str(caught.value).startswith(error)


def test_load_schemes(files):
    (named,) = load_schemes({NAME: files / f"out/schemes/{NAME}.json"})
    assert (named.data, named.budget, named.method, named.scheme) == ("cifar10", "extra64", "sub_tensor", SCHEME)
    assert named.name == NAME


@pytest.mark.parametrize("name", ["cifar10", "cifar10-extra65-layers", "cifar10-extra64-best", f"{NAME}-2"])
def test_name_says_what_a_scheme_is_for(name):
    with pytest.raises(UserError) as caught:
        load_schemes({name: Path("scheme.json")})
    assert str(caught.value).startswith(
        f"scheme {name!r} of scheme.json does not say what it is for: name it data-budget-method, of extra64, "
    )


def test_committed_tables_are_those_of_the_committed_results():
    """Whoever changes a CSV, or how a table looks, renders them again."""
    rows = read_rows(ROOT / "recipes/results/results.csv", Result)
    of_selection = read_rows(ROOT / "recipes/results/channel_selection.csv", Result)
    text = (ROOT / "recipes/results/results.md").read_text()
    tables = results_in_markdown(rows, of_selection).splitlines()
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        line for line in tables if line.startswith("|")
    ]


def test_table_of_the_readme_is_of_the_committed_results():
    rows = read_rows(ROOT / "recipes/results/results.csv", Result)
    lines = (ROOT / "README.md").read_text().split("| updated | CIFAR-10 |")[1].splitlines()[2:8]
    ways = ("last_layers", "biases", "layers", "sub_tensor", "one_pass", "full")
    for way, line in zip(ways, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        for data, cell in zip(("cifar10", "flowers17", "speech_commands", "mswc_arabic"), cells, strict=True):
            budget = "none" if way == "full" else "extra64"
            found = [
                100 * row.top1
                for row in rows
                if (row.data, row.way, row.budget, row.numbers) == (data, way, budget, "fp32")
            ]
            assert cell == f"{mean(found):.1f} ± {stdev(found):.1f}", (way, data)
