"""A scheme's provenance has the command that gives it again."""

import hashlib
import shlex

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.provenance import provenance_of


def test_provenance(tmp_path):
    table = tmp_path / "a table.csv"
    table.write_bytes(b"kind\n")
    arguments = {
        "contributions": str(table), "data": "digits", "mcu": "stm32f746", "budget_kib": None, "all_mcus": False,
        "seed": 3, "learning_rate": 0.1, "data_options": {"task": "words10"}, "out_dir": "there", "resume": True,
        "logger": "none",
    }  # fmt: skip
    budget = Budget("peak", 288 * 1024, MICROCONTROLLERS["stm32f746"])
    provenance = provenance_of("evolve_update_scheme", arguments, table, budget, {"score": 0.5})
    command = provenance.pop("command")
    assert shlex.split(command) == [
        *("uv", "run", "recipes/evolve_update_scheme.py", "--contributions", str(table), "--data", "digits"),
        *("--mcu", "stm32f746"),
        *("--all_mcus", "false", "--seed", "3", "--learning_rate", "0.1", "--data_options", '{"task": "words10"}'),
    ]
    assert provenance == {
        "contributions_sha256": hashlib.sha256(b"kind\n").hexdigest(),
        "contributions_arguments": None,
        "memory": "peak",
        "mcu": "stm32f746",
        "budget_bytes": 288 * 1024,
        "found": {"score": 0.5},
    }


def test_provenance_of_what_trains_nothing(tmp_path):
    """Settings of trials decide nothing then, but how the table was measured does."""
    table = tmp_path / "contributions.csv"
    table.write_bytes(b"kind\n")
    (tmp_path / "config.yaml").write_text("data: digits\nsteps: 20\n")
    arguments = {"contributions": str(table), "steps": 100, "weights": "none", "resolution": 32, "final_seeds": 3}
    provenance = provenance_of("evolve_update_scheme", arguments, table, Budget("extra", 1024), {})
    assert shlex.split(provenance["command"])[3:] == ["--contributions", str(table), "--resolution", "32"]
    assert provenance["contributions_arguments"] == {"data": "digits", "steps": 20}
