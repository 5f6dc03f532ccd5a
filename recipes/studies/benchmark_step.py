"""Times one training step: full update, masked gradients, frozen parameters, sub-tensor layers.

    uv run recipes/studies/benchmark_step.py --width 0.35 --resolution 128 --batch_size 32 \\
        --scheme recipes/schemes/mobilenet_v2-w0.35_lin2022_99kb.json

Seconds on a laptop CPU. On two cores of an AMD EPYC that command gives 19 to 20 ms for sub-tensor layers, 20 to 21 for
freezing alone, 54 to 56 for full update and 11 for the forward pass, and 41 times fewer bytes saved than full update.

All methods train the same folded network and take turns in one process, so that a machine whose speed drifts favours
none; ratios are medians over the rounds. Beside them stands the forward pass alone, which no method can undercut.
"""

import json as json_format
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.saved_for_backward import measure_saved_bytes
from microtune.recipes.training.command_line import check_at_least_one, run_recipe
from microtune.recipes.training.networks import describe_network
from microtune.recipes.training.plan import source_of_weights
from microtune.recipes.training.schemes import scheme_by_name_or_file
from microtune.recipes.training.step_time import forward_only, interleaved_seconds, prepared, training_step

METHODS = ("full", "published", "freeze", "mask", "sub_tensor")


def main(
    scheme: str = "sub_tensor",
    mcu: str = "stm32f746",
    network: str = "mobilenet_v2",
    width: float | None = None,
    resolution: int = 128,
    input_width: int | None = None,
    batch_size: int = 32,
    num_classes: int = 10,
    in_channels: int = 3,
    head_convolution: bool = False,
    rounds: int = 30,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Times one training step: full update, masked gradients, frozen parameters, sub-tensor layers.

    Args:
        scheme: Update scheme: a JSON file, or classifier, biases, last_layers, sub_tensor (as much as fits) or full.
        mcu: Microcontroller that a scheme given by name shall fit.
        network: Network: mobilenet_v2, or the .safetensors file of an int8 network.
        width: Multiplier of the network's channels, by default 0.35; an int8 network has its own.
        resolution: Height and width of the input in pixels; of a spectrogram, its frames.
        input_width: Width of the input where it is another: of a spectrogram, its bands.
        batch_size: Number of samples per step.
        num_classes: Number of outputs of the classifier.
        in_channels: Number of channels of the input.
        head_convolution: Whether the network has its last 1x1 convolution.
        rounds: Steps of each method that are timed, after two that are not.
        threads: Number of PyTorch's threads; by default as many as the machine has cores.
        json: Whether to print one JSON object and nothing else.
    """
    check_at_least_one(batch_size=batch_size, rounds=rounds, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    input_shape = (in_channels, resolution, resolution if input_width is None else input_width)
    source = source_of_weights(network, "none")
    described = describe_network(source, input_shape, num_classes, width, head_convolution)
    update_scheme = scheme_by_name_or_file(scheme, described, PeakMemory(described.operations), microcontroller(mcu))
    samples = torch.randn(batch_size, *described.input_shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (batch_size,))
    plain = described.network.to(memory_format=torch.channels_last)

    steps: dict[str, Callable[[], None]] = {"forward": lambda: forward_only(plain, samples)}
    saved = {}
    for method in METHODS:
        ready = prepared(plain, update_scheme, described.operations, method)
        saved[method] = measure_saved_bytes(ready.network, samples) / batch_size
        steps[method] = training_step(ready, samples, labels)
    seconds = interleaved_seconds(steps, rounds, show_progress=not json)

    report = {"forward_seconds": median(seconds["forward"]), "threads": torch.get_num_threads(), "methods": {}}
    for method in METHODS:
        ratios = [full / own for full, own in zip(seconds["full"], seconds[method], strict=True)]
        report["methods"][method] = {
            "step_seconds": median(seconds[method]),
            "autograd_bytes_per_sample": saved[method],
            "speedup_over_full": median(ratios),
            "saved_bytes_ratio_of_full": saved["full"] / saved[method],
        }
    print(json_format.dumps(report, indent=2)) if json else print_table(report, batch_size)


def print_table(report: dict, batch_size: int) -> None:
    """Prints one row per method."""
    table = Table("method", "step, ms", "speed-up over full", "saved for backward, KiB per sample", "full / saved")
    for method, row in report["methods"].items():
        table.add_row(
            method,
            f"{row['step_seconds'] * 1e3:.1f}",
            f"{row['speedup_over_full']:.2f}",
            f"{row['autograd_bytes_per_sample'] / 1024:.1f}",
            f"{row['saved_bytes_ratio_of_full']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"forward pass alone: {report['forward_seconds'] * 1e3:.1f} ms; "
        f"batch size {batch_size}, {report['threads']} threads"
    )


if __name__ == "__main__":
    run_recipe(main)
