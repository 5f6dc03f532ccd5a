"""Every option of every recipe and study says what it is, as a whole noun phrase."""

import importlib
import re
from pathlib import Path

import pytest

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.recipes.training.command_line import parser_of

ROOT = Path(__file__).parents[2]
RUNNABLES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in ("recipes", "recipes/studies")
    for path in (ROOT / folder).glob("*.py")
    if path.read_text().endswith("    run_recipe(main)\n")
)
# what begins so is the rest of a phrase whose noun is the option's name, or an order
NO_NOUN = re.compile(r"(Of|At|By|Where|How|Which|What|To|Print|Train|Leave|Fetch|Add|Test|Learn)\b")


@pytest.mark.parametrize("name", RUNNABLES)
def test_help_texts(name):
    parser = parser_of(importlib.import_module(f"microtune.{name}").main)
    options = [action for action in parser._actions if action.dest not in ("help", "config", "print_config")]
    assert options
    for option in options:
        assert option.help, option.dest
        assert not NO_NOUN.match(option.help), f"{option.dest}: {option.help}"
        assert "likewise" not in option.help.lower(), f"{option.dest}: {option.help}"
        assert option.help.rstrip().endswith("."), f"{option.dest}: {option.help}"
        if option.dest == "mcu":
            assert option.help.endswith(f"Known are {', '.join(MICROCONTROLLERS)}.")
