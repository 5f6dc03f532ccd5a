"""What the READMEs show can be typed in, and what they point at is there."""

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
READMES = ("README.md", "recipes/README.md", "recipes/studies/README.md", "modules/README.md", "datamodules/README.md")
TEXTS = {name: (ROOT / name).read_text() for name in READMES}
MOST_LINES = 250  # of the first one, which is to be read at a sitting


def blocks(language, name):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[name], flags=re.DOTALL)


def runnable_recipes():
    paths = [path for folder in ("recipes", "recipes/studies") for path in (ROOT / folder).glob("*.py")]
    return {str(path.relative_to(ROOT)) for path in paths if path.read_text().endswith("    run_recipe(main)\n")}


def recipe_commands():
    """Every command line of a recipe in the READMEs and in the recipes' own docstrings."""
    texts = [block for name in READMES for block in blocks("bash", name)]
    texts += [path.read_text() for path in (ROOT / "recipes").rglob("*.py")]
    lines = re.sub(r"\\+\n", " ", "\n".join(texts)).splitlines()
    return [found.group() for line in lines if (found := re.search(r"(?<=uv run )recipes/.*", line))]


def test_the_readmes():
    """Every folder's is among them, no figure is left open, and the first one stays short."""
    found = {str(path.relative_to(ROOT)) for pattern in ("*.md", "*/*.md", "*/*/*.md") for path in ROOT.glob(pattern)}
    assert {name for name in found if name.endswith("README.md") and not name.startswith(".")} == set(READMES)
    assert not any("@@" in text for text in TEXTS.values())
    assert len(TEXTS["README.md"].splitlines()) <= MOST_LINES


def test_commands_were_found():
    recipes = {shlex.split(line)[0] for line in recipe_commands()}
    # every recipe shows how it is called, in its docstring at least
    assert recipes == runnable_recipes()
    assert len(blocks("bash", "README.md")) >= 3


@pytest.mark.parametrize("line", recipe_commands())
def test_command_is_understood(line):
    recipe, *words = shlex.split(line)
    assert (ROOT / recipe).is_file()
    main = importlib.import_module(f"microtune.{recipe.removesuffix('.py').replace('/', '.')}").main
    parse(parser_of(main), words)


def test_every_recipe_has_its_line_in_a_table():
    rows = [line for text in TEXTS.values() for line in text.splitlines() if line.startswith("| `")]
    described = {name for row in rows for name in re.findall(r"^\| `(\w+\.py)`", row)}
    assert {Path(recipe).name for recipe in runnable_recipes()} <= described


@pytest.mark.parametrize("name", READMES)
def test_what_is_pointed_at_is_there(name):
    """Files, pictures and, of our own Markdown, headings."""
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", TEXTS[name]):
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target


def test_script_with_an_own_module_runs_outside_the_checkout(monkeypatch, caplog, tmp_path):
    (script,) = blocks("python", "README.md")
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    trainer = runpy.run_path("script.py", run_name="__main__")["trainer"]
    assert trainer.global_step == 4
    assert "SparseUpdate trains" in caplog.text
    assert type(trainer.lightning_module.backbone.layer4[1].conv1) is torch.nn.Conv2d  # a plain network is left


def test_scheme_of_the_script_is_for_its_network():
    (script,) = blocks("python", "README.md")
    line = next(line for line in script.splitlines() if line.startswith("scheme = "))
    scheme = eval(line.removeprefix("scheme = "), {"UpdateScheme": UpdateScheme})
    network = fold_batch_norm(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
    scheme.check(find_operations(network, (3, 64, 64)).convolutions, "resnet18")


def test_scheme_in_json_is_one():
    (text,) = blocks("json", "modules/README.md")
    scheme = UpdateScheme.from_dict(json.loads(text))
    scheme.check(find_operations(mobilenet_v2(0.35, num_classes=10), (3, 96, 96)).convolutions, "mobilenet_v2-w0.35")
