"""What a search tells on its way and at its end: the log, the pictures and what is printed."""

import itertools
import logging
from dataclasses import astuple
from pathlib import Path
from typing import Any, Self

from microtune.datamodules.progress import progress_bar
from microtune.modules.memory.training_memory import extra_memory_per_layer
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.integer_program import Genome
from microtune.modules.search.scheme_optimum import Optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.front import print_schemes_of_front
from microtune.recipes.search.gradient_search import NATS
from microtune.recipes.search.rungs import Rungs, best_first, fitness_of
from microtune.recipes.training.memory_figures import KIB
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.pictures import drawn

log = logging.getLogger(__name__)


class SearchLog:
    """Shows how far a search is, and logs it to Weights & Biases.

    Args:
        logger: wandb, csv or none.
        out_dir: The run's folder.
        arguments: Of the recipe.
        table: The contributions that the search goes by.
        optimum: Of the problem.
        problem: What is solved.
        rungs: What all evaluations may cost.

    Example::

        with SearchLog("none", out_dir, arguments, table, optimum, problem, Rungs((100,), 20_000)) as search_log:
            search_log.generation(state)
    """

    def __init__(
        self,
        logger: LoggerName,
        out_dir: Path,
        arguments: dict[str, Any],
        table: ContributionTable,
        optimum: Optimum,
        problem: SearchProblem,
        rungs: Rungs,
    ):
        self.out_dir, self.optimum, self.problem, self.rungs = out_dir, optimum, problem, rungs
        self.experiment = None
        if logger == "wandb":
            # two seconds and more, which a command line need not wait for
            import wandb

            from microtune.recipes.training.loggers import make_loggers, wandb_run

            self.experiment = wandb_run(make_loggers(logger, out_dir, "evolve_update_scheme"))
            self.experiment.define_metric("search/*", step_metric="search/evaluations")
            self.experiment.config.update({"arguments": arguments}, allow_val_change=True)
            rows = [list(astuple(row)) for row in table.rows]
            self.experiment.log({"contributions": wandb.Table(list(Contribution.__dataclass_fields__), rows)})
        self.progress = progress_bar()
        self.bar = self.progress.add_task(self.unit, total=rungs.total_steps)

    @property
    def unit(self) -> str:
        """What the budget is of."""
        return "evaluations" if self.rungs.steps == (1,) else "optimizer steps"

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def generation(self, state: SearchState) -> None:
        """Logs the last generation: best, mean and spread of the fitness, memory, distance to the optimum."""
        if not state.history:
            return
        record = state.history[-1]
        best = best_first(state.fitness)[0]
        shown = self.unit
        if self.unit != "evaluations":
            value = record["best"]  # a loss is negative
            shown += f", best {value * 100:.2f} %" if value >= 0 else f", lowest loss {-value:.4f}"
        spent = self.rungs.spent(state.fitness) + state.rate_steps
        self.progress.update(self.bar, completed=spent, description=shown)
        if self.progress.disable and self.unit != "evaluations":  # a search by the table takes seconds
            log.info("%s of %s %s", f"{spent:,}", f"{self.rungs.total_steps:,}", shown)
        distance = self.optimum.score - self.problem.score(best)
        if self.experiment is not None:
            values = {f"search/{name}": value for name, value in record.items()}
            self.experiment.log({**values, "search/distance_to_optimum": distance})

    def finish(self, report: dict[str, Any]) -> None:
        """Logs the results, the picture, and the scheme as an artifact with its provenance."""
        if self.experiment is None:
            return
        import wandb

        plain = {name: value for name, value in report.items() if isinstance(value, int | float | str)}
        self.experiment.summary.update(plain)
        scheme = UpdateScheme.load(self.out_dir / "scheme.json")
        name = f"update-scheme-{self.experiment.id}"
        artifact = wandb.Artifact(name, type="update-scheme", metadata=scheme.to_dict())
        # immutable: taken from the run's folder when it is synced, not copied elsewhere first
        artifact.add_file(str(self.out_dir / "scheme.json"), policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact)
        if (self.out_dir / "search.png").exists():
            self.experiment.log({"search": wandb.Image(str(self.out_dir / "search.png"))})
        wandb.finish()


def draw_search(
    state: SearchState, problem: SearchProblem, optimum: Optimum, rungs: Rungs, judged_by: str, path: Path
) -> None:
    """Draws the fitness of every scheme on the last rung that it reached, and the best so far, as a PNG."""
    with drawn(path, figsize=(8, 4.5)) as axes:
        scale = -1 if judged_by == "loss" else 100  # points
        last = [(index, fitness_of(known)) for index, known in enumerate(state.fitness.values(), 1)]
        fitness = [(index, *known) for index, known in last if known is not None]
        for rung in sorted({rung for _, rung, _ in fitness}):
            points = [(index, value * scale) for index, reached, value in fitness if reached == rung]
            label = "schemes" if len(rungs.steps) == 1 else f"schemes, {rungs.steps[int(rung)]} steps"
            axes.plot(*zip(*points, strict=True), ".", markersize=3, alpha=0.35 if rung == 0 else 0.8, label=label)
        best = itertools.accumulate((known for _, *known in fitness), max)
        indexes = [index for index, *_ in fitness]
        axes.step(indexes, [value * scale for _, value in best], where="post", color="tab:red", label="best so far")
        if judged_by == "table":
            axes.axhline(optimum.score * scale, color="black", linestyle="--", label="proven optimum")
            axes.set_ylabel("sum of gains, points")
        else:
            of_optimum = fitness_of(state.fitness.get(optimum.genome, ()))
            if of_optimum is not None:
                axes.axhline(of_optimum[1] * scale, color="black", linestyle="--", label="the table's optimum")
            loss = judged_by == "loss"
            axes.set_ylabel("loss on the validation split, nats" if loss else "top-1 on the validation split, %")
        axes.set(xlabel="evaluations", title=f"{problem.network} within {problem.budget_bytes / KIB:.0f} KiB")
        axes.legend(fontsize=8)


def print_report(report: dict[str, Any], scheme: UpdateScheme, out_dir: Path) -> None:
    """Prints what was found, how good it is, and where it lies."""
    whose = f" of {report['mcu']}" if report["mcu"] else ""
    weights = ", ".join(f"{ratio:g} of {layer}" for layer, ratio in scheme.weights.items()) or "no weight"
    print(f"biases of the last {scheme.bias_depth} convolutions; {weights}")
    print(
        f"{report['memory_bytes'] / KIB:.1f} KiB of {report['memory']} memory, within "
        f"{report['budget_bytes'] / KIB:.1f} KiB{whose}"
    )
    names = ("score", "optimum_score", "random_score", "random_blind_score")
    if report["score_unit"] == NATS:
        found, best, at_random, blind = (f"{report[name]:.4g}" for name in names)
        said = f"predicted decrease of the loss {found} {NATS}"
    else:
        found, best, at_random, blind = (f"{report[name] * 100:.2f}" for name in names)
        said = f"sum of gains {found} points"
    print(f"{said}, proven optimum {best}, random search {at_random}, with blind repair {blind}")
    if report["fitness"] == "accuracy":
        best = f"best validation accuracy of a trial: {report['best_fitness']:.2%}"
        if report["judged_by"] == "loss":
            best = f"lowest validation loss of a trial: {-report['best_fitness']:.4f} nats"
        print(
            f"{best} of {report['evaluations']} schemes at learning rate {report['learning_rate']:g}, "
            f"{report['steps_spent']} optimizer steps in all"
        )
        for pair in report["rank_correlation_of_rungs"]:
            if pair["correlation"] is not None:
                print(
                    f"rank correlation of {pair['steps']} and {pair['longer_steps']} steps: {pair['correlation']:.2f} "
                    f"over {pair['schemes']} schemes"
                )
    for finalist in report.get("finalists", []):
        print(
            f"finalist: proxy {finalist['proxy']:.4f}, validation accuracy after longer training "
            f"{finalist['val_top1_mean']:.2%} ± {finalist['val_top1_std']:.2%}, "
            f"{finalist['memory_bytes'] / KIB:.1f} KiB"
        )
    if "front" in report:
        print_schemes_of_front(report, out_dir)
    if report.get("rank_correlation") is not None:
        print(f"rank correlation of proxy and longer training: {report['rank_correlation']:.2f}")
    print(f"scheme: {out_dir / 'scheme.json'}, report: {out_dir / 'report.json'}, {report['seconds']:.0f} s")


def updated_layers(problem: SearchProblem, genome: Genome) -> list[dict[str, Any]]:
    """Each layer whose weight is updated: its channels, what it adds to extra memory in bytes, and its score."""
    scheme, convolutions = problem.scheme(genome), problem.peak_memory.operations.convolutions
    gains = dict(zip(problem.layers, problem.gains_of(genome)[1:], strict=True))
    return [
        {
            "layer": memory.name,
            "updated_channels": scheme.updated_channels(convolution),
            "in_channels": convolution.in_channels,
            "extra_bytes": memory.input_bytes + memory.weight_bytes,
            "predicted_gain": gains[memory.name],
        }
        for convolution, memory in zip(convolutions, extra_memory_per_layer(convolutions, scheme), strict=True)
        if memory.name in scheme.weights
    ]


def print_computed(report: dict[str, Any], scheme: UpdateScheme, out_dir: Path) -> None:
    """Prints a scheme that a gradient says is best, layer by layer."""
    whose = f" of {report['mcu']}" if report["mcu"] else ""
    layers = report["layers"]
    width = max([len("layer"), *(len(layer["layer"]) for layer in layers)])
    print(f"{'layer':{width}}  channels updated  extra memory, KiB  gain, {NATS}")
    for layer in layers:
        channels = f"{layer['updated_channels']} of {layer['in_channels']}"
        extra = f"{layer['extra_bytes'] / KIB:.2f}"
        print(f"{layer['layer']:{width}}  {channels:>16}  {extra:>17}  {layer['predicted_gain']:.4g}")
    print(f"biases of the last {scheme.bias_depth} convolutions: gain {report['bias_score']:.4g}")
    print(f"predicted decrease of the loss {report['score']:.4g} {NATS}, the most within the budget")
    print(
        f"{report['memory_bytes'] / KIB:.1f} KiB of {report['memory']} memory, within "
        f"{report['budget_bytes'] / KIB:.1f} KiB{whose}"
    )
    print(
        f"from one backward pass over {report['gradient_samples']} of {report['choice_samples']} samples, with a "
        f"classifier fitted to the others (top-1 in the pass {report['classifier_top1']:.2%})"
    )
    print(f"scheme: {out_dir / 'scheme.json'}, report: {out_dir / 'report.json'}, {report['seconds']:.0f} s")


def draw_front(rows: list[dict[str, Any]], network: str, path: Path) -> None:
    """Draws the score over the memory of the schemes of all microcontrollers, as a PNG."""
    with drawn(path, figsize=(8, 4.5)) as axes:
        fitting = [row for row in rows if "score" in row]
        together: dict[tuple[float, float], list[str]] = {}
        for row in fitting:
            place = (row["memory_bytes"] / KIB, row["score"] * 100)
            together.setdefault(place, []).append(row["mcu"])
        front = sorted(together)
        axes.plot([x for x, _ in front], [y for _, y in front], "o-", linewidth=1)
        for index, (place, names) in enumerate(sorted(together.items())):
            is_last = index == len(front) - 1
            axes.annotate(
                "\n".join(names), place, xytext=(-6 if is_last else 6, -4), textcoords="offset points", fontsize=8,
                va="top", ha="right" if is_last else "left",
            )  # fmt: skip
        too_small = [row["mcu"] for row in rows if "too_small" in row]
        if too_small:
            text = "too small at this resolution: " + ", ".join(too_small)
            axes.text(0.01, 0.98, text, transform=axes.transAxes, va="top", fontsize=8, color="grey")
        axes.margins(x=0.1, y=0.25)
        axes.set(xlabel="peak memory of one training step, KiB", ylabel="sum of gains, points")
        axes.set_title(f"Evolved schemes of {network}, one per microcontroller")


def print_front(rows: list[dict[str, Any]], out_dir: Path) -> None:
    """Prints a line per microcontroller."""
    for row in rows:
        if "too_small" in row:
            print(f"{row['mcu']}: {row['too_small']}")
        else:
            print(
                f"{row['mcu']}: {row['memory_bytes'] / KIB:.1f} KiB of {row['budget_bytes'] / KIB:.1f}, sum of gains "
                f"{row['score'] * 100:.2f} points, proven optimum {row['optimum_score'] * 100:.2f}"
            )
    print(f"schemes, report.json and front.png: {out_dir}")
