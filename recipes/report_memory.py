"""Says where each byte of a training step goes, and whether it fits a microcontroller.

    uv run recipes/report_memory.py --width 0.35 --resolution 128 \\
        --scheme recipes/schemes/mobilenet_v2-w0.35_lin2022_99kb.json --mcu stm32f746

Takes seconds, nearly all of them to import PyTorch. The scheme above needs 299.3 KiB at its peak, where an STM32F746
has 288.0.
"""

import dataclasses
import json as json_format
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from microtune.modules.memory.microcontrollers import Microcontroller, microcontroller
from microtune.modules.memory.peak_memory import OptimizerState, PeakMemory, Timeline
from microtune.modules.memory.training_memory import LayerExtraMemory, extra_memory_per_layer
from microtune.recipes.training.command_line import run_recipe
from microtune.recipes.training.memory_figures import KIB, draw_memory, memory_figures, size_of, what_would_fit
from microtune.recipes.training.networks import describe_network
from microtune.recipes.training.plan import source_of_weights
from microtune.recipes.training.schemes import scheme_by_name_or_file


def main(
    scheme: str,
    mcu: str | None = None,
    network: str = "mobilenet_v2",
    width: float | None = None,
    resolution: int = 128,
    input_width: int | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    head_convolution: bool = False,
    optimizer_state: OptimizerState = "none",
    gradient_accumulation: bool = False,
    depthwise_in_place: bool = True,
    gradient_bytes: int = 4,
    latent_weights: bool = False,
    sram_bytes: int | None = None,
    flash_bytes: int | None = None,
    reserve_bytes: int | None = None,
    out_dir: Path = Path("runs/report_memory"),
    json: bool = False,
) -> None:
    """Says where each byte of a training step goes, and whether it fits a microcontroller.

    Args:
        scheme: Update scheme: a JSON file, or classifier, biases, last_layers, sub_tensor (as much as fits) or full.
        mcu: Microcontroller that a training step must fit.
        network: Network: mobilenet_v2, or the .safetensors file of an int8 network.
        width: Multiplier of the network's channels, by default 0.35; an int8 network has its own.
        resolution: Height and width of the input in pixels; of a spectrogram, its frames.
        input_width: Width of the input where it is another: of a spectrogram, its bands.
        num_classes: Number of outputs of the classifier.
        in_channels: Number of channels of the input.
        head_convolution: Whether the network has its last 1x1 convolution.
        optimizer_state: State that the optimizer keeps: none, momentum or adam.
        gradient_accumulation: Whether gradients are carried from step to step.
        depthwise_in_place: Whether depthwise convolutions write over their input.
        gradient_bytes: Number of bytes per element of a gradient.
        latent_weights: Whether the device keeps copies in floating point of the weights that it updates.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash for the frozen weights; describes another microcontroller, or replaces the named one's.
        reserve_bytes: SRAM that is not for training; describes another microcontroller, or replaces the named one's.
        out_dir: Folder of the picture, whose name is made of network, scheme and microcontroller.
        json: Whether to print one JSON object and nothing else, and to draw nothing.
    """
    device = microcontroller(mcu, sram_bytes, flash_bytes, reserve_bytes)
    input_shape = (in_channels, resolution, resolution if input_width is None else input_width)
    source = source_of_weights(network, "none", width, head_convolution)
    described = describe_network(source, input_shape, num_classes, width, head_convolution)
    peak_memory = PeakMemory(
        described.operations,
        optimizer_state=optimizer_state,
        gradient_accumulation=gradient_accumulation,
        depthwise_in_place=depthwise_in_place,
        gradient_bytes=gradient_bytes,
        latent_weights=latent_weights,
    )
    update_scheme = scheme_by_name_or_file(scheme, described, peak_memory, device)
    report = memory_figures(peak_memory, update_scheme, device)
    layers = extra_memory_per_layer(described.operations.convolutions, update_scheme)
    timeline = peak_memory.timeline(update_scheme)
    report["layers"] = [dataclasses.asdict(layer) | {"total_bytes": layer.total_bytes} for layer in layers]
    nothing_fits = peak_memory.floor_bytes > device.budget_bytes
    if nothing_fits:
        report["advice"] = what_would_fit(peak_memory, device, described.network)
    if json:
        print(json_format.dumps(report, indent=2))
        return

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(layer_table(layers))
    console.print(timeline_table(timeline))
    console.print(summary(report, device))
    if nothing_fits:
        console.print(report["advice"])
    size = size_of(input_shape)
    shown = name_of(Path(scheme))
    picture = out_dir / f"{described.name}_{size.replace(' ', '')}_{shown}_{device.name}.png"
    draw_memory(timeline, device, f"One training step of {described.name} at {size}, {shown}", picture)
    console.print(f"picture: {picture}", soft_wrap=True)


def name_of(scheme: Path) -> str:
    """What tells a scheme from others in pictures: of a search's or run's ``scheme.json`` the folder's name.

    Example::

        name_of(Path("runs/evolved/scheme.json"))  # "evolved"
    """
    return scheme.absolute().parent.name if scheme.name == "scheme.json" else scheme.stem


def layer_table(layers: list[LayerExtraMemory]) -> Table:
    """Extra memory per layer that is updated, in bytes."""
    table = Table("layer", title="Extra memory, bytes")
    for column in ("bias", "mask", "kept input", "weight", "sum"):
        table.add_column(column, justify="right")
    for layer in layers:
        if layer.total_bytes:
            values = (layer.bias_bytes, layer.mask_bytes, layer.input_bytes, layer.weight_bytes, layer.total_bytes)
            table.add_row(layer.name, *(f"{value:,.0f}" for value in values))
    return table


def timeline_table(timeline: Timeline, rows: int = 8) -> Table:
    """The moments of the step with the most bytes alive."""
    shown = {name: values for name, values in timeline.bytes_of_category.items() if values.any()}
    table = Table(title=f"The {rows} highest of {len(timeline.moments)} moments, bytes alive")
    table.add_column("moment", no_wrap=True)
    for name in (*shown, "sum"):
        table.add_column(name, justify="right")
    total = timeline.total_bytes
    for index in total.argsort()[::-1][:rows]:
        table.add_row(timeline.moments[index], *(f"{values[index]:,}" for values in (*shown.values(), total)))
    return table


def summary(report: dict, device: Microcontroller) -> str:
    """The figures that decide, one per line."""
    flash = "not checked"
    if device.flash_bytes is not None:
        flash = f"of {device.flash_bytes / KIB:.0f} KiB: {_verdict(report['flash_margin_bytes'])}"
    return "\n".join(
        (
            f"extra memory      {report['extra_memory_bytes'] / KIB:9.1f} KiB",
            f"peak memory       {report['peak_memory_bytes'] / KIB:9.1f} KiB of {device.budget_bytes / KIB:.1f} KiB "
            f"({device.sram_bytes / KIB:.0f} KiB less a reserve of {device.reserve_bytes / KIB:.0f} KiB): "
            f"{_verdict(report['sram_margin_bytes'])}",
            f"  not reordered   {report['peak_memory_bytes_without_reordering'] / KIB:9.1f} KiB",
            f"  classifier only {report['classifier_only_peak_bytes'] / KIB:9.1f} KiB",
            f"flash             {report['flash_bytes'] / KIB:9.1f} KiB {flash}",
            f"autograd, PyTorch {report['autograd_bytes_per_sample'] / KIB:9.1f} KiB per sample",
            f"multiply-accumulates: {report['forward_macs'] / 1e6:.1f} M forward, "
            f"{report['backward_macs'] / 1e6:.1f} M backward",
        )
    )


def _verdict(margin_bytes: int) -> str:
    return f"{'fits' if margin_bytes >= 0 else 'does not fit'}, {margin_bytes / KIB:+.1f} KiB"


if __name__ == "__main__":
    run_recipe(main)
