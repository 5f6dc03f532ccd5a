"""The help of the options that training recipes share: every one has it, and it can be read."""

from dataclasses import fields
from typing import get_args

import docstring_parser
import pytest

from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.recipes.training.options import (
    BudgetOptions,
    DeviceOptions,
    Int8Options,
    NetworkOptions,
    OptimizationOptions,
    RunOptions,
)

GROUPS = (NetworkOptions, BudgetOptions, OptimizationOptions, Int8Options, DeviceOptions, RunOptions)


def help_of(group):
    """The help of each option, as the parser reads it."""
    return {one.arg_name: " ".join(one.description.split()) for one in docstring_parser.parse(group.__doc__).params}


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_has_help(group):
    assert list(help_of(group)) == [field.name for field in fields(group)]


@pytest.mark.parametrize("group", GROUPS)
def test_help_is_a_sentence_of_its_own(group):
    for name, text in help_of(group).items():
        assert text[0].isupper(), name
        assert text.endswith("."), name
        assert not text.startswith("Of "), name
        assert "Likewise" not in text, name


def test_criteria_are_named():
    words = help_of(BudgetOptions)["channel_choice"].replace(",", " ").replace(".", " ").split()
    assert [choice for choice in get_args(Criterion) if choice not in words] == []
