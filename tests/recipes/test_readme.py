"""What the README shows can be typed in."""

import importlib
import json
import logging
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.command_line import parse, parser_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def runnable_recipes():
    paths = [path for folder in ("recipes", "recipes/studies") for path in (ROOT / folder).glob("*.py")]
    return {str(path.relative_to(ROOT)) for path in paths if path.read_text().endswith("    run_recipe(main)\n")}


def recipe_commands():
    """Every command line of a recipe in the README and in the recipes' own docstrings."""
    texts = ["\n".join(blocks("bash")), *(path.read_text() for path in (ROOT / "recipes").rglob("*.py"))]
    lines = re.sub(r"\\+\n", " ", "\n".join(texts)).splitlines()
    return [found.group() for line in lines if (found := re.search(r"(?<=uv run )recipes/.*", line))]


def test_every_figure_is_filled_in():
    assert "@@" not in README


def test_commands_were_found():
    recipes = {shlex.split(line)[0] for line in recipe_commands()}
    # every recipe shows how it is called, in its docstring at least
    assert recipes == runnable_recipes()
    assert len(blocks("bash")) >= 5


@pytest.mark.parametrize("line", recipe_commands())
def test_command_is_understood(line):
    recipe, *words = shlex.split(line)
    assert (ROOT / recipe).is_file()
    main = importlib.import_module(f"microtune.{recipe.removesuffix('.py').replace('/', '.')}").main
    parse(parser_of(main), words)


def test_recipes_that_the_readme_names_are_there():
    named = set(re.findall(r"`(\w+\.py)`", README))
    assert named == {Path(recipe).name for recipe in runnable_recipes()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_script_with_an_own_module_runs_outside_the_checkout(monkeypatch, caplog, tmp_path):
    script, *_ = blocks("python")
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    trainer = runpy.run_path("script.py", run_name="__main__")["trainer"]
    assert trainer.global_step == 4
    assert "SparseUpdate trains" in caplog.text
    assert type(trainer.lightning_module.backbone.layer4[1].conv1) is torch.nn.Conv2d  # a plain network is left


def test_scheme_of_the_script_is_for_its_network():
    script, *_ = blocks("python")
    line = next(line for line in script.splitlines() if line.startswith("scheme = "))
    scheme = eval(line.removeprefix("scheme = "), {"UpdateScheme": UpdateScheme})
    network = fold_batch_norm(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
    scheme.check(find_operations(network, (3, 64, 64)).convolutions, "resnet18")


def test_scheme_in_json_is_one():
    (text,) = blocks("json")
    scheme = UpdateScheme.from_dict(json.loads(text))
    scheme.check(find_operations(mobilenet_v2(0.35, num_classes=10), (3, 96, 96)).convolutions, "mobilenet_v2-w0.35")
