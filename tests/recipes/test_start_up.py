"""What a recipe imports before it knows that it needs it: nothing that takes long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
RUNNABLE = [
    path
    for folder in (RECIPES, RECIPES / "studies")
    for path in sorted(folder.glob("*.py"))
    if path.read_text().endswith("    run_recipe(main)\n")
]
SLOW = ("lightning", "torchvision", "torchaudio", "torchmetrics", "matplotlib", "scipy", "sklearn", "wandb")
SLOW += ("soundfile", "distributed", "torch._dynamo")

# of each kind one that a plan refuses before anything is read
MISTAKES = {
    "train_cifar": ("--scheme", "smallest"),
    "train_speech_commands": ("--n_mels", "4"),
    "evolve_update_scheme": ("--contributions", "nowhere.csv", "--finalists", "0", "--budget_kib", "0"),
    "measure_contributions": ("--data", "digits", "--seeds", "0"),
    "report_memory": ("--scheme", "full"),
    "quickstart": ("--mcu", "pdp11"),
}

HELP_AND_MISTAKES = """
import importlib, json, sys
from microtune.recipes.training.command_line import parser_of, run_recipe
slow, recipes, mistakes = map(json.loads, sys.argv[1:])
found = {}
for recipe in recipes:
    parser_of(importlib.import_module(recipe).main).format_help()
    found[f"{recipe} --help"] = [name for name in slow if name in sys.modules]
for recipe, words in mistakes.items():
    sys.argv[1:] = words
    try:
        run_recipe(importlib.import_module(f"microtune.recipes.{recipe}").main)
    except SystemExit as ended:
        found[f"{recipe} refused"] = [ended.code, *(name for name in slow if name in sys.modules)]
print(json.dumps(found))
"""
A_RUN = """
import json, runpy, sys
slow = json.loads(sys.argv[1])
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(*[name for name in slow if name in sys.modules], file=sys.stderr, end="")
"""


def ended(script, *words, folder):
    """A script that was run in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, json.dumps(SLOW), *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip


def module_of(path):
    return ".".join(("microtune", "recipes", *path.relative_to(RECIPES).with_suffix("").parts))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What is imported by the help of each recipe, and then by mistakes: all in one process, which costs seconds."""
    folder = tmp_path_factory.mktemp("nowhere")
    process = ended(HELP_AND_MISTAKES, json.dumps(list(map(module_of, RUNNABLE))), json.dumps(MISTAKES), folder=folder)
    assert process.returncode == 0, process.stderr
    assert not list(folder.iterdir())
    return json.loads(process.stdout)


def test_recipes_were_found():
    assert len(RUNNABLE) >= 15


@pytest.mark.parametrize("recipe", [module_of(path) for path in RUNNABLE])
def test_help_imports_nothing_that_takes_long(recipe, imported):
    assert imported[f"{recipe} --help"] == []


@pytest.mark.parametrize("recipe", MISTAKES)
def test_refusal_imports_nothing_that_takes_long(recipe, imported):
    assert imported[f"{recipe} refused"] == [2]


def test_json_of_the_memory_report_is_one_object_and_imports_nothing_that_takes_long(scheme_file, tmp_path):
    process = ended(
        A_RUN, RECIPES / "report_memory.py", "--network", "mobilenet_v2", "--width", 0.35, "--resolution", 128,
        "--scheme", scheme_file, "--mcu", "stm32f746", "--out_dir", tmp_path / "out", "--json", folder=tmp_path,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert isinstance(json.loads(process.stdout), dict)
    assert not (tmp_path / "out").exists()
