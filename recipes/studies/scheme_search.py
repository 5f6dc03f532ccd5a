"""A search for a scheme within a study: what ``evolve_update_scheme.py`` does, as plain values for a worker."""

import shutil
import time
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.user_error import UserError
from microtune.recipes.search.gradient_search import gradient_search, measure_gradient
from microtune.recipes.search.options import GRADIENT, Effort, Level, SearchBudgetOptions, TrialSettings
from microtune.recipes.search.plan import plan_search
from microtune.recipes.search.run import begin_search, run_search
from microtune.recipes.search.trials import described_by
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.result_rows import memory_and_kib
from microtune.recipes.training.command_line import flat

# of the settings of trials what the recipe has as options for a search by a gradient
OF_SETTINGS = (
    "network", "data", "data_dir", "data_options", "weights", "width", "head_convolution", "resolution", "base_depth",
    "batch_size", "learning_rate", "features", "features_dir",
)  # fmt: skip


@dataclass(frozen=True)
class SchemeSearch:
    """A search by a gradient, or one that begins there and trains schemes.

    Args:
        settings: Of the network, its data and the trials.
        budget: As rows of results name it.
        folder: Of the search; it is done when its report is there.
        effort: How schemes are judged.
        level: As in ``evolve_update_scheme.py``.
        channel_multiple: Likewise.
    """

    settings: TrialSettings
    budget: str
    folder: Path
    effort: Effort = Effort()
    level: Level = "sub_tensor"
    channel_multiple: int = 1

    @property
    def report_file(self) -> Path:
        """What the search leaves behind when it is done."""
        return self.folder / "report.json"

    @property
    def budget_options(self) -> SearchBudgetOptions:
        """The budget as the recipe's options."""
        if self.budget in MICROCONTROLLERS:
            return SearchBudgetOptions(mcu=self.budget)
        memory, kib = memory_and_kib(self.budget)
        return SearchBudgetOptions(memory, kib)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of ``evolve_update_scheme.py``, which would find the same."""
        arguments: dict[str, Any] = {"contributions": GRADIENT, "level": self.level}
        arguments |= {"channel_multiple": self.channel_multiple, "fitness": self.effort.fitness}
        arguments |= {name: getattr(self.settings, name) for name in OF_SETTINGS} | given(self.effort)
        arguments["head_convolution"] = self.settings.head_convolution or None
        return flat(arguments | {"seed": self.effort.seed} | given(self.budget_options))


def given(options: Any) -> dict[str, Any]:
    """Of a dataclass of options those that are not as by default."""
    defaults = {one.name: one.default for one in fields(options) if one.default is not MISSING}
    return {name: value for name, value in asdict(options).items() if value != defaults.get(name, MISSING)}


def search_once(search: SchemeSearch) -> str | None:
    """Searches, or goes on with a search that was stopped; returns what went wrong, if anything did."""
    torch.set_num_threads(1)
    started, folder, arguments = time.monotonic(), search.folder, search.arguments
    is_begun = (folder / "config.yaml").exists()
    if not is_begun:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        plan = plan_search(
            GRADIENT, search.budget_options, search.effort, search.settings,
            base_depth=search.settings.base_depth, channel_multiple=search.channel_multiple,
        )  # fmt: skip
        settings, described = plan.settings, described_by(plan.settings)
        measured = measure_gradient(settings, plan.choice_samples, plan.effort.seed)
        found = gradient_search(
            described, measured, plan.budget, settings.base_depth, search.level, search.channel_multiple,
            is_coarse=not plan.is_computed,
        )  # fmt: skip
        begin_search(folder, arguments, resume=is_begun)
        with Workers() as workers:
            run_search(
                found, plan.effort, plan.rungs, settings, plan.budget, workers, arguments, "none", folder, started
            )
    except UserError as error:
        return f"{folder.name}: {error}"
    return None
