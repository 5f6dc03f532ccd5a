"""Where a scheme came from: everything that makes it again."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from microtune.recipes.search.budget import Budget
from microtune.recipes.search.options import GRADIENT, TrialSettings
from microtune.recipes.training.run_folder import read_config


def provenance_of(
    recipe: str, arguments: dict[str, Any], contributions: Path, budget: Budget, found: dict[str, Any]
) -> dict[str, Any]:
    """Everything that made a scheme: the commands, the table's contents, the budget, and what the search found.

    The command leaves out what does not decide the outcome, and what is None by default. Where the table lies in the
    folder of its measurement, the arguments of that are kept too; a table from a gradient is described by the command.
    """
    left_out = {"out_dir", "resume", "logger", "processes", "cluster", "features", "features_limit_mib", "features_dir"}
    if arguments.get("data") is None:  # nothing is trained
        left_out |= TrialSettings.__dataclass_fields__.keys() - {"network", "width", "head_convolution", "resolution"}
        left_out |= {"trial_seeds", "final_steps", "final_seeds"}
    is_gradient = arguments["contributions"] == GRADIENT
    if is_gradient and arguments["fitness"] == "table":
        left_out |= {"steps", "learning_rate", "copies", "trial_seeds", "final_steps", "final_seeds"}
    words = [f"recipes/{recipe}.py"]
    for name, value in arguments.items():
        if value is not None and value != {} and name not in left_out:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    device = budget.microcontroller
    config = contributions.parent / "config.yaml"
    return {
        "command": "uv run " + shlex.join(words),
        "contributions_sha256": hashlib.sha256(contributions.read_bytes()).hexdigest(),
        "contributions_arguments": read_config(config) if config.exists() and not is_gradient else None,
        "memory": budget.memory,
        "mcu": None if device is None else device.name,
        "budget_bytes": budget.size_bytes,
        "found": found,
    }
