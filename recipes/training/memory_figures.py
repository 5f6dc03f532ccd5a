"""What a scheme needs in memory, whether that fits a microcontroller, and the picture of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from microtune.modules.memory.microcontrollers import Fit, Microcontroller
from microtune.modules.memory.peak_memory import CATEGORIES, PeakMemory, Timeline, largest_resolution_that_fits
from microtune.modules.memory.training_memory import (
    autograd_bytes_per_sample,
    dynamic_choice,
    extra_memory_bytes,
    extra_memory_per_layer,
    flash_bytes,
    multiply_accumulates,
)
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.pictures import drawn

KIB = 1024


def scheme_fits(
    peak_memory: PeakMemory,
    scheme: UpdateScheme,
    microcontroller: Microcontroller,
    rechosen_by: Criterion | None = None,
) -> bool:
    """Whether training under the scheme fits the microcontroller."""
    return fit_of(peak_memory, scheme, microcontroller, rechosen_by).fits


def fit_of(
    peak_memory: PeakMemory,
    scheme: UpdateScheme,
    microcontroller: Microcontroller,
    rechosen_by: Criterion | None = None,
) -> Fit:
    """What training under the scheme needs, beside what the microcontroller has.

    Args:
        peak_memory: Of the network, with the options of the training.
        scheme: What is updated.
        microcontroller: The device.
        rechosen_by: The score by which the device chooses channels anew in training; by default it does not.
    """
    if rechosen_by is None:
        return Fit(microcontroller, peak_memory.peak_bytes(scheme), flash_bytes(peak_memory.operations, scheme))
    choice = dynamic_choice(peak_memory.operations, scheme, rechosen_by)
    # a bound: biases and classifier have no part in the scores, and need no sums
    summing = replace(peak_memory, gradient_accumulation=peak_memory.gradient_accumulation or choice.sums_gradients)
    return Fit(microcontroller, summing.peak_bytes(scheme) + choice.score_bytes, choice.flash_bytes)


def memory_figures(
    peak_memory: PeakMemory,
    scheme: UpdateScheme,
    microcontroller: Microcontroller,
    rechosen_by: Criterion | None = None,
) -> dict[str, str | int | float | bool | None]:
    """Both accounts of memory and the work of one step, as plain values for a report.

    Where channels are chosen anew, margins and ``fits`` are those of the choice, which needs more than a step.
    """
    operations = peak_memory.operations
    fit = fit_of(peak_memory, scheme, microcontroller, rechosen_by)
    unordered = replace(peak_memory, reordering=False)
    work = multiply_accumulates(operations, scheme)
    figures = {
        "mcu": microcontroller.name,
        "budget_bytes": microcontroller.budget_bytes,
        "fits": fit.fits,
        "extra_memory_bytes": extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme),
        "peak_memory_bytes": peak_memory.peak_bytes(scheme),
        "peak_memory_bytes_without_reordering": unordered.peak_bytes(scheme),
        "classifier_only_peak_bytes": peak_memory.floor_bytes,
        "sram_margin_bytes": fit.sram_margin_bytes,
        "flash_bytes": fit.flash_bytes,
        "flash_margin_bytes": fit.flash_margin_bytes,
        "autograd_bytes_per_sample": autograd_bytes_per_sample(operations, scheme),
        "forward_macs": work.forward,
        "backward_macs": work.backward,
    }
    return figures if rechosen_by is None else figures | {"rechoosing_peak_memory_bytes": fit.peak_bytes}


def refuse_oversize(
    peak_memory: PeakMemory,
    scheme: UpdateScheme,
    microcontroller: Microcontroller,
    network: nn.Module,
    remedy: str,
    rechosen_by: Criterion | None = None,
) -> None:
    """Raises ``UserError`` if training does not fit: what it needs, what there is, what costs most, what would do."""
    fit = fit_of(peak_memory, scheme, microcontroller)
    if fit.fits:
        _refuse_oversize_choice(fit_of(peak_memory, scheme, microcontroller, rechosen_by), rechosen_by, remedy)
        return
    if fit.flash_margin_bytes is not None and fit.flash_margin_bytes < 0:
        raise UserError(
            f"the frozen weights need {_kib(fit.flash_bytes)} of flash, but {microcontroller.name} has "
            f"{_kib(microcontroller.flash_bytes)}: take a narrower network or another microcontroller; {remedy}"
        )
    needs = (
        f"one training step needs {_kib(fit.peak_bytes)} at its peak ({highest_moment(peak_memory.timeline(scheme))}), "
        f"but {microcontroller.name} has {_kib(microcontroller.budget_bytes)} "
        f"({_kib(microcontroller.sram_bytes)} less a reserve of {_kib(microcontroller.reserve_bytes)})"
    )
    if peak_memory.floor_bytes > microcontroller.budget_bytes:
        raise UserError(f"{needs}; {what_would_fit(peak_memory, microcontroller, network)}; {remedy}")
    layers = sorted(extra_memory_per_layer(peak_memory.operations.convolutions, scheme), key=lambda x: -x.total_bytes)
    costly = ", ".join(f"{layer.name} ({_kib(layer.total_bytes)})" for layer in layers[:3])
    raise UserError(
        f"{needs}; the smallest scheme, the classifier only, needs {_kib(peak_memory.floor_bytes)}; most of the extra "
        f"memory goes to {costly}: update fewer channels or layers; {remedy}"
    )


def _refuse_oversize_choice(fit: Fit, rechosen_by: Criterion | None, remedy: str) -> None:
    """Raises ``UserError`` if choosing channels anew does not fit where a step does."""
    if fit.fits:
        return
    device = fit.microcontroller
    if fit.sram_margin_bytes < 0:
        lacking = f"{_kib(fit.peak_bytes)} at its peak, but there are {_kib(device.budget_bytes)}"
    else:
        lacking = f"{_kib(fit.flash_bytes)} of flash for what leaves, but there are {_kib(device.flash_bytes)}"
    raise UserError(
        f"one training step fits {device.name}, but choosing channels anew by {rechosen_by} needs {lacking}: choose "
        f"once, or update fewer channels or layers; {remedy}"
    )


def what_would_fit(peak_memory: PeakMemory, microcontroller: Microcontroller, network: nn.Module) -> str:
    """Where the classifier's update alone does not fit: the largest resolution at which it would."""
    input_shape = peak_memory.operations.tensors[0]
    floor = f"even the classifier alone needs {_kib(peak_memory.floor_bytes)} at {size_of(input_shape)}"
    if input_shape[1] != input_shape[2]:
        return f"{floor}: take a smaller input or a narrower network"
    largest = largest_resolution_that_fits(network, peak_memory, microcontroller, below=input_shape[1])
    if largest is None:
        return f"{floor}, and no smaller resolution would do: take a narrower network or fewer classes"
    return f"{floor}; the largest resolution that fits, in steps of 16, is {largest} px: give --resolution {largest}"


def size_of(input_shape: tuple[int, int, int]) -> str:
    """Height and width of the input, in words.

    Example::

        size_of((3, 96, 96))  # "96 px"
        size_of((1, 97, 40))  # "97 x 40"
    """
    _, height, width = input_shape
    return f"{height} px" if height == width else f"{height} x {width}"


def highest_moment(timeline: Timeline) -> str:
    """Name of the moment with the most bytes alive."""
    return timeline.moments[int(timeline.total_bytes.argmax())]


def _kib(size_bytes: float) -> str:
    return f"{size_bytes / KIB:.1f} KiB"


def draw_memory(timeline: Timeline, microcontroller: Microcontroller, title: str, path: Path | str) -> None:
    """Draws the bytes alive over the operations of one training step, with the budget as a line, as a PNG."""
    from matplotlib import colormaps  # imported by need, as all of matplotlib

    with drawn(path, figsize=(11, 5)) as axes:
        edges = np.arange(len(timeline.moments) + 1) - 0.5  # of the steps, so that the first and last are whole
        colors = colormaps["tab10"].colors
        series = [timeline.bytes_of_category[category] / KIB for category in CATEGORIES]
        shown = [
            (name, values, color)
            for name, values, color in zip(CATEGORIES, series, colors, strict=False)
            if any(values)
        ]
        axes.stackplot(
            edges,
            [np.append(values, values[-1]) for _, values, _ in shown],
            labels=[name for name, _, _ in shown],
            colors=[color for _, _, color in shown],
            step="post",
        )
        budget_kib = microcontroller.budget_bytes / KIB
        axes.axhline(
            budget_kib, color="black", linestyle="--", label=f"budget of {microcontroller.name}: {budget_kib:.0f} KiB"
        )
        forward = sum(name.endswith("forward") for name in timeline.moments)
        axes.axvline(forward - 0.5, color="grey", linewidth=0.8)
        for x, label in ((forward / 2, "forward"), ((forward + len(timeline.moments)) / 2, "backward")):
            axes.text(x, 0.99, label, transform=axes.get_xaxis_transform(), ha="center", va="top", color="grey")
        highest = int(timeline.total_bytes.argmax())
        peak_kib = timeline.total_bytes[highest] / KIB
        is_early = highest < len(timeline.moments) / 2
        axes.annotate(
            f"peak {peak_kib:.1f} KiB\n{timeline.moments[highest]}",
            (highest, peak_kib),
            xytext=(8 if is_early else -8, 4),
            textcoords="offset points",
            ha="left" if is_early else "right",
            fontsize=8,
        )
        axes.set(xlabel="operation", ylabel="bytes alive, KiB", title=title, xlim=(-0.5, len(timeline.moments) - 0.5))
        axes.set_ylim(0, 1.2 * max(peak_kib, budget_kib))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
