"""Which criterion chooses the channels best: all of them, chosen once or anew while training, on several data sets.

    uv run recipes/studies/compare_channel_selection.py --data_sets recipes/results/data_sets.json --processes 2

Every scheme updates the same fraction of the input channels of as many of the last expanding convolutions as fit the
budget; which channels, each criterion says. Of all layers alike only a part is trained, so that it matters which. All
get the same steps and the learning rate that the weight norm, the paper's criterion, learns best with at that budget,
by validation accuracy with a seed that is not reported; half of it where a training diverges. The same command goes on
where it was stopped. A training of 200 steps takes about five seconds on one core of an AMD EPYC.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import wandb

from microtune.modules.atomic_files import whole_file
from microtune.modules.csv_rows import write_rows
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.search.short_training import Choice
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.simple_schemes import expanding_convolutions_that_fit
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import described_by
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.compare_schemes import Judge
from microtune.recipes.studies.data_set_list import keep_sources, load_data_sets
from microtune.recipes.studies.measure_results import SEED, budget_by_name, some_of
from microtune.recipes.studies.paired_trainings import MAY_CHANGE, opened_folder
from microtune.recipes.studies.result_pictures import draw_selection
from microtune.recipes.studies.result_rows import SelectionResult
from microtune.recipes.studies.result_tables import selection_section
from microtune.recipes.studies.trial_grid import Cell, best_rates, result, train_until_none_diverges
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.loggers import make_loggers, wandb_run
from microtune.recipes.training.memory_figures import scheme_fits
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.run_folder import new_folder

# a comparison may grow: every training is known by what it does
MAY_GROW = MAY_CHANGE | {"only", "criteria", "dynamic", "budgets", "seeds"}


def main(
    data_sets: Path,
    only: str | None = None,
    criteria: str = ",".join(get_args(Criterion)),
    dynamic: str = ",".join(get_args(Criterion)),
    budgets: str = "extra32,extra64",
    ratio: float = 0.25,
    steps: int = 200,
    batch_size: int = 32,
    seeds: int = 3,
    base_depth: int = 36,
    rechoose_every: int = 50,
    choice_samples: int = 256,
    processes: int = 1,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> list[SelectionResult]:
    """Which criterion chooses the channels best: all of them, chosen once or anew while training.

    Args:
        data_sets: List of data sets, such as recipes/results/data_sets.json.
        only: Which of them, separated by commas.
        criteria: Those that choose once, at the start: weight_norm, gradient_norm, fisher, taylor, loss_decrease,
            activation_norm, random.
        dynamic: Those that choose anew while the network trains; empty for none.
        budgets: KiB of extra memory (extra64), or microcontrollers whose peak counts.
        ratio: Fraction of the input channels of a layer that is updated.
        steps: Optimizer steps of every training.
        batch_size: Samples of a step.
        seeds: Trainings of each.
        base_depth: The deepest bias depth; all before is frozen, and computed once.
        rechoose_every: Steps after which the dynamic choices move.
        choice_samples: Training samples that a choice is made by.
        processes: Trainings that run at once, one thread each.
        logger: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the comparison; by default a new one below runs/. Where it was begun, it goes on.
    """
    arguments = flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(
        steps=steps, batch_size=batch_size, seeds=seeds, base_depth=base_depth, rechoose_every=rechoose_every,
        choice_samples=choice_samples, processes=processes,
    )  # fmt: skip
    if not 0 < ratio < 1:
        raise UserError(f"ratio is {ratio}: give more than 0 and less than 1, or there is nothing to choose")
    known = get_args(Criterion)
    choices = [Choice(criterion, 0, choice_samples) for criterion in some_of(criteria, known, "criteria")]
    if dynamic.strip():
        choices += [Choice(one, rechoose_every, choice_samples) for one in some_of(dynamic, known, "dynamic")]
    budget_names = listed(budgets)
    for budget in budget_names:
        budget_by_name(budget)  # says what is wrong before anything is written
    chosen = load_data_sets(data_sets, listed(only))
    out_dir = out_dir or new_folder(Path("runs") / "compare_channel_selection")
    with opened_folder(out_dir, arguments, MAY_GROW), Workers(processes) as workers:
        keep_sources(chosen, out_dir)
        cells = []
        for name, data_set in chosen.items():
            settings = data_set.trial_settings(
                "fp32", base_depth, steps, batch_size, features="disk", features_dir=str(out_dir / "features" / name)
            )
            of_data = [
                cell
                for budget in budget_names
                for cell in cells_of(
                    name, settings, budget, scheme_of(settings, budget, ratio, choices), choices, seeds
                )
            ]
            by_norm = [replace(cell, choice=Choice("weight_norm", 0, choice_samples)) for cell in of_data]
            rates = best_rates(by_norm, data_set.learning_rates, SEED, ("data", "budget"), workers, out_dir)
            for cell in of_data:
                rate = rates.get((name, cell.labels["budget"]))
                cells += [] if rate is None else [replace(cell, learning_rate=rate)]
        group = ("data", "budget", "criterion", "rechoose_every")
        cells = train_until_none_diverges(cells, group, ("data", "budget"), workers, out_dir)
        rows = [row for cell in cells if (row := row_of(cell, out_dir)) is not None]
        write_rows(out_dir / "channel_selection.csv", rows, SelectionResult)
        drawn = [name for name in chosen if any(row.data == name for row in rows)]
        for name in drawn:
            draw_selection([row for row in rows if row.data == name], out_dir / f"channel_selection_{name}.png")
        log_to_wandb(logger, out_dir, drawn, arguments)
    if rows:
        with whole_file(out_dir / "channel_selection.md") as partial:
            partial.write_text(selection_section(rows), encoding="utf-8")
        print(selection_section(rows))
    print(
        f"{len(rows)} of {len(cells)} trainings: {out_dir / 'channel_selection.csv'}, and a picture per data set beside"
    )
    return rows


def scheme_of(settings: TrialSettings, budget: str, ratio: float, choices: Sequence[Choice]) -> UpdateScheme:
    """The same fraction of channels of as many of the last expanding convolutions as fit, however they are chosen.

    Raises:
        UserError: Not even the last one does.
    """
    described, wanted = described_by(settings), budget_by_name(budget)
    judge = Judge(described, wanted)

    rechosen_by = [choice.criterion for choice in choices if choice.rechoose_every]
    device = wanted.microcontroller

    def fits(scheme: UpdateScheme) -> bool:
        if scheme.bias_depth > settings.base_depth or not judge.fits(scheme):
            return False
        # extra memory leaves out what choosing anew needs
        return device is None or all(scheme_fits(judge.peak_memory, scheme, device, one) for one in rechosen_by)

    scheme = expanding_convolutions_that_fit(described.name, described.operations, fits, ratios=(ratio,))
    if scheme is None or not scheme.weights:
        raise UserError(
            f"{ratio:.0%} of the channels of the last expanding convolution is more than {wanted}: give a larger "
            "budget or a smaller --ratio"
        )
    return scheme


def cells_of(
    data: str, settings: TrialSettings, budget: str, scheme: UpdateScheme, choices: Sequence[Choice], seeds: int
) -> list[Cell]:
    """A training for each choice and seed."""
    operations = described_by(settings).operations
    extra = extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)
    return [
        Cell(
            {
                "data": data, "budget": budget, "criterion": choice.criterion, "rechoose_every": choice.rechoose_every,
                "seed": seed, "extra_memory_bytes": extra,
            },
            settings, scheme.to_dict(), seed, settings.learning_rate, choice,
        )
        for choice in choices
        for seed in range(seeds)
    ]  # fmt: skip


def row_of(cell: Cell, out_dir: Path) -> SelectionResult | None:
    """What came out of a training that is done."""
    found = result(cell, out_dir)
    if found is None:
        return None
    return SelectionResult(
        **cell.labels,
        top1=found["top1"]["test"],
        val_top1=found["top1"]["val"],
        steps=cell.settings.steps,
        batch_size=cell.settings.batch_size,
        learning_rate=cell.learning_rate,
        seconds=round(found["seconds"], 1),
    )


def log_to_wandb(logger: LoggerName, out_dir: Path, names: Sequence[str], arguments: dict[str, Any]) -> None:
    """Logs the pictures and the CSV as one run."""
    if logger != "wandb":
        return
    experiment = wandb_run(make_loggers(logger, out_dir, "compare_channel_selection"))
    if experiment is not None:
        experiment.config.update({"arguments": arguments}, allow_val_change=True)
        experiment.log({name: wandb.Image(str(out_dir / f"channel_selection_{name}.png")) for name in names})
        artifact = wandb.Artifact(f"channel-selection-{experiment.id}", type="results")
        artifact.add_file(str(out_dir / "channel_selection.csv"), policy="immutable", skip_cache=True)
        experiment.log_artifact(artifact)
        wandb.finish()


if __name__ == "__main__":
    run_recipe(main)
