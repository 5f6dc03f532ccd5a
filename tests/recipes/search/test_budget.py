"""One budget, of one kind of memory."""

import pytest

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget, all_budgets, budget_of

BUDGETS = {
    "extra": (("extra", 100.0, None, None, None, None), ("extra", 102400, None)),
    "peak in KiB": (("peak", 0.5, None, None, None, None), ("peak", 512, None)),
    "default": (("peak", None, None, None, None, None), ("peak", 288 * 1024, "stm32f746")),
    "by name": (("peak", None, "nrf52840", None, None, None), ("peak", 192 * 1024, "nrf52840")),
    "other reserve": (("peak", None, "stm32f746", None, None, 0), ("peak", 320 * 1024, "stm32f746")),
    "reserve of the default": (("peak", None, None, None, None, 1024), ("peak", 319 * 1024, "stm32f746")),
    "own": (("peak", None, None, 65536, None, None), ("peak", 32 * 1024, "custom")),
}


@pytest.mark.parametrize("kind", BUDGETS)
def test_budget(kind):
    arguments, (memory, size_bytes, name) = BUDGETS[kind]
    budget = budget_of(*arguments)
    assert (budget.memory, budget.size_bytes) == (memory, size_bytes)
    assert (budget.microcontroller and budget.microcontroller.name) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extra", None, None, None, None, None), "extra memory leaves out the forward pass"),
        (("extra", None, "stm32f746", None, None, None), "give --budget_kib, or --memory peak"),
        (("peak", 100.0, "stm32f746", None, None, None), "a microcontroller and budget_kib are two budgets"),
        (("extra", 100.0, None, None, None, 0), "a microcontroller and budget_kib are two budgets"),
        (("peak", None, "z80", None, None, None), "unknown microcontroller 'z80'"),
        *((("extra", value, None, None, None, None), f"budget_kib is {value}: give a positive number of kibibytes")
          for value in (0.0, -1.0, float("nan"), float("inf"))),
    ],
)  # fmt: skip
def test_no_budget(arguments, message):
    with pytest.raises(UserError, match=message):
        budget_of(*arguments)


def test_budget_in_words():
    assert str(Budget("peak", 288 * 1024, MICROCONTROLLERS["stm32f746"])) == "288.0 KiB of peak memory of stm32f746"
    assert str(Budget("extra", 1536)) == "1.5 KiB of extra memory"


def test_budgets_of_all_microcontrollers():
    budgets = all_budgets()
    assert {budget.microcontroller.name for budget in budgets} == set(MICROCONTROLLERS)
    assert all(budget.size_bytes == budget.microcontroller.budget_bytes for budget in budgets)
    assert [budget.size_bytes for budget in budgets] == sorted(budget.size_bytes for budget in budgets)
