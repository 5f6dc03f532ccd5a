"""Pictures of measured accuracies, and of what update schemes update."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from microtune.modules.atomic_files import whole_file
from microtune.modules.memory.microcontrollers import KIB
from microtune.modules.user_error import UserError
from microtune.recipes.studies.result_rows import (
    BUDGETS,
    METHODS,
    NUMBERS,
    NamedScheme,
    Result,
    budget_name,
    sorted_budgets,
    title_of,
)
from microtune.recipes.studies.result_tables import REFERENCE, WITH_BUDGET, selection_name, ways_to_choose

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds
    from microtune.modules.sparse_update.update_scheme import UpdateScheme

COLORS = dict(zip(WITH_BUDGET, plt.get_cmap("tab10").colors, strict=False))
MARKERS = dict(zip(WITH_BUDGET, "sv^oDP<", strict=True))
GREY, BLUE, LIGHT_BLUE = "#e4e4e4", "#1f77b4", "#a9cbe6"
ONE_CHANNEL = ("speech_commands", "mswc_arabic")  # spectrograms


def draw_accuracy_over_memory(rows: Sequence[Result], path: Path | str) -> None:
    """Draws the accuracy of every method over its extra memory as a PNG, a panel for each kind of numbers.

    Args:
        rows: Of one data set, at least one, in any order.
        path: Of the picture.

    Example::

        draw_accuracy_over_memory([row for row in rows if row.data == "cifar10"], "accuracy_over_memory_cifar10.png")
    """
    matplotlib.use("Agg")
    present = [numbers for numbers in NUMBERS if any(row.numbers == numbers for row in rows)]
    figure, panels = plt.subplots(
        1, len(present), figsize=(1.5 + 5 * len(present), 4.8), layout="constrained", sharey=True, squeeze=False
    )
    for axes, numbers in zip(panels[0], present, strict=True):
        of_numbers = [row for row in rows if row.numbers == numbers]
        _draw_numbers(axes, of_numbers)
        full_bytes = [row.extra_memory_bytes for row in of_numbers if row.way == "full"]
        needs = f"; full update needs {statistics.mean(full_bytes) / KIB:,.0f} KiB" if full_bytes else ""
        axes.set_title(f"{numbers}{needs}", fontsize=10)
    panels[0, 0].set_ylabel("top-1 on the test split, %")
    found = {row.way for row in rows}
    handles = [
        Line2D([], [], color=COLORS[method], marker=MARKERS[method], label=METHODS[method])
        for method in WITH_BUDGET
        if method in found
    ]
    if any(row.budget == "stm32f746" for row in rows):
        handles.append(
            Line2D([], [], color="black", marker="o", fillstyle="none", linestyle="", label="as fits an STM32F746")
        )
    if "full" in found:
        handles.append(Line2D([], [], color="black", linestyle="--", label="full update"))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{title_of(rows[0].data)}: mean and range over the seeds", fontsize=11)
    _save(figure, path)


def _draw_numbers(axes: Axes, rows: Sequence[Result]) -> None:
    for method in WITH_BUDGET:
        line, apart = [], []
        for budget in BUDGETS:
            cell = [row for row in rows if (row.way, row.budget) == (method, budget)]
            if cell:
                point = (statistics.mean(row.extra_memory_bytes for row in cell) / KIB, *_mean_and_range(cell))
                (apart if budget == "stm32f746" else line).append(point)
        look = {"color": COLORS[method], "marker": MARKERS[method], "markersize": 5, "linewidth": 1.2, "capsize": 2}
        for points, further in ((sorted(line), {}), (apart, {"linestyle": "", "fillstyle": "none"})):
            if points:
                memory_kib, mean, below, above = zip(*points, strict=True)
                axes.errorbar(memory_kib, mean, (below, above), elinewidth=0.8, **look | further)
    full = [row for row in rows if row.way == "full"]
    if full:
        mean, below, above = _mean_and_range(full)
        axes.axhspan(mean - below, mean + above, color="black", alpha=0.08, linewidth=0)
        axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda kib, _: f"{kib:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    lowest_kib, highest_kib = axes.get_xlim()
    axes.set_xlim(min(lowest_kib, 56), max(highest_kib, 290))  # the budgets, with a margin
    axes.set_xlabel("extra memory, KiB")
    axes.grid(linewidth=0.4)


def _mean_and_range(rows: Sequence[Result]) -> tuple[float, float, float]:
    """In per cent: the mean, and how far the lowest and the highest lie from it."""
    top1 = [row.top1 * 100 for row in rows]
    mean = statistics.mean(top1)
    return mean, max(0.0, mean - min(top1)), max(0.0, max(top1) - mean)


def draw_selection(rows: Sequence[Result], path: Path | str) -> None:
    """Draws the accuracy by every way to choose channels as a PNG, a panel for each budget.

    Args:
        rows: Of one data set, at least one, in any order.
        path: Of the picture.

    Example::

        draw_selection([row for row in rows if row.data == "cifar10"], "channel_selection_cifar10.png")
    """
    matplotlib.use("Agg")
    budgets, ways = sorted_budgets(row.budget for row in rows), ways_to_choose(rows)
    intervals = sorted({every for _, every in ways})
    figure, panels = plt.subplots(
        1, len(budgets), figsize=(2.2 + 2.8 * len(budgets), 1.6 + 0.26 * len(ways)), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, budget in zip(panels[0], budgets, strict=True):
        for place, way in enumerate(ways):
            cell = [row for row in rows if (row.criterion, row.rechoose_every, row.budget) == (*way, budget)]
            if not cell:
                continue
            mean, below, above = _mean_and_range(cell)
            color = plt.get_cmap("tab10")(intervals.index(way[1]) % 10)
            axes.errorbar(mean, place, xerr=([below], [above]), fmt="o", markersize=5, capsize=2, color=color)
            if way == REFERENCE:
                axes.axvline(mean, color="black", linestyle="--", linewidth=0.8)
        axes.set_title(budget_name(budget), fontsize=10)
        axes.grid(axis="x", linewidth=0.4)
        axes.locator_params(axis="x", nbins=5)
    panels[0, 0].set_yticks(range(len(ways)), [selection_name(*way) for way in ways], fontsize=9)
    panels[0, 0].set_ylim(len(ways) - 0.5, -0.5)
    figure.supxlabel("top-1 on the test split, %; mean and range over the seeds", fontsize=10)
    line = "; dashed: weight norm, static" if REFERENCE in ways else ""
    figure.suptitle(f"{title_of(rows[0].data)}: by how its channels are chosen{line}", fontsize=11)
    _save(figure, path)


def input_channels(schemes: Sequence[NamedScheme]) -> dict[str, int]:
    """How many input channels each convolution of the schemes' network has, in forward order.

    Args:
        schemes: Of one data set, at least one.

    Raises:
        UserError: The first is not for a MobileNetV2 in floating point, or another is not for the same.
    """
    from microtune.recipes.training.networks import describe_network

    first = schemes[0]
    found = re.fullmatch(r"mobilenet_v2-w(\d+\.\d+)(-head)?", first.scheme.network)
    if not found:
        raise UserError(
            f"scheme {first.name} is for {first.scheme.network}: give one for a MobileNetV2 in floating point"
        )
    input_shape = (1 if first.data in ONE_CHANNEL else 3, 96, 96)
    described = describe_network("none", input_shape, 10, float(found[1]), bool(found[2]))
    for one in schemes:
        try:
            one.scheme.check(described.operations.convolutions, first.scheme.network)
        except UserError as error:
            raise UserError(f"scheme {one.name}: {error}") from error
    return {convolution.name: convolution.in_channels for convolution in described.operations.convolutions}


def draw_updated_channels(schemes: Sequence[NamedScheme], path: Path | str) -> None:
    """Draws which input channels of which layers' weights schemes update as a PNG: methods by budgets.

    Args:
        schemes: Of one data set and one network, at least one, in any order.
        path: Of the picture.

    Raises:
        UserError: The schemes are not all for one MobileNetV2 in floating point, or none updates a weight.

    Example::

        scheme = UpdateScheme.load("schemes/cifar10-extra64-one_pass.json")
        draw_updated_channels([NamedScheme("cifar10", "extra64", "one_pass", scheme)], "updated_channels_cifar10.png")
    """
    matplotlib.use("Agg")
    first = schemes[0]
    channels_of = input_channels(schemes)
    layers = [name for name in channels_of if any(name in one.scheme.weights for one in schemes)]
    if not layers:
        raise UserError(f"no scheme of {first.data} updates a weight, and there is nothing to draw: leave them out")
    budgets = [budget for budget in BUDGETS if any(one.budget == budget for one in schemes)]
    methods = [method for method in METHODS if any(one.method == method for one in schemes)]
    figure, panels = plt.subplots(
        len(methods), len(budgets), figsize=(2 + 3.2 * len(budgets), 1.3 + (0.7 + 0.2 * len(layers)) * len(methods)),
        layout="constrained", sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    of_place = {(one.method, one.budget): one.scheme for one in schemes}
    for row, method in enumerate(methods):
        for column, budget in enumerate(budgets):
            axes = panels[row, column]
            if (method, budget) not in of_place:
                axes.set_axis_off()
                continue
            _draw_scheme(axes, of_place[method, budget], {layer: channels_of[layer] for layer in layers})
            biases = of_place[method, budget].bias_depth
            axes.set_title(f"{METHODS[method]}, {budget_name(budget)}\nbiases of the last {biases} layers", fontsize=9)
            is_first = not any((method, before) in of_place for before in budgets[:column])
            axes.tick_params(labelleft=is_first, labelbottom=True, labelsize=8)
            if not any((below, budget) in of_place for below in methods[row + 1 :]):
                axes.set_xlabel("input channel", fontsize=9)
    any_partial = any(_is_open(one.scheme, layer) for one in schemes for layer in one.scheme.weights)
    handles = [Patch(color=BLUE, label="updated"), Patch(color=GREY, label="frozen")]
    if any_partial:
        handles.insert(1, Patch(color=LIGHT_BLUE, label="updated; which ones is chosen when training begins"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(
        f"{title_of(first.data)}: updated input channels of the weights of {first.scheme.network}", fontsize=11
    )
    _save(figure, path)


def _draw_scheme(axes: Axes, scheme: "UpdateScheme", channels_of: Mapping[str, int]) -> None:
    image = channel_grid(scheme, channels_of)
    axes.imshow(
        image, ListedColormap(["white", GREY, LIGHT_BLUE, BLUE]), vmin=0, vmax=3, aspect="auto", interpolation="none"
    )
    axes.set_yticks(range(len(channels_of)), list(channels_of))
    axes.set_yticks(np.arange(len(channels_of) + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)


def channel_grid(scheme: "UpdateScheme", channels_of: Mapping[str, int]) -> np.ndarray:
    """For each layer and input channel 3 where it is updated, 2 where one of these is, 1 where not, 0 beyond the last.

    Args:
        scheme: One that fits the network.
        channels_of: The layers that are drawn, and how many input channels each has.

    Returns:
        Integers of shape (layers, most channels of a layer).
    """
    grid = np.zeros((len(channels_of), max(channels_of.values())), dtype=np.int8)
    for row, (layer, count) in enumerate(channels_of.items()):
        grid[row, :count] = 1
        if layer in scheme.channels:
            grid[row, list(scheme.channels[layer])] = 3
        elif _is_open(scheme, layer):
            grid[row, : int(count * scheme.weights[layer] + 1e-9)] = 2
        elif layer in scheme.weights:
            grid[row, :count] = 3
    return grid


def _is_open(scheme: "UpdateScheme", layer: str) -> bool:
    """Whether the scheme says how many channels, but not which."""
    return layer not in scheme.channels and scheme.weights.get(layer, 1) < 1


def _save(figure: plt.Figure, path: Path | str) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
