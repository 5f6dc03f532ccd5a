"""Trains an int8 network and the one in floating point that it was, on the same seeds: what int8 and QAS are worth.

    uv run recipes/studies/compare_int8.py --data image_folder --data_dir flowers --weights KERAS_FILE.npz \\
        --network network.safetensors --resolution 128 --epochs 20 \\
        --rows float:SCHEME.json,latent:SCHEME.json,in_place:SCHEME.json,unscaled:SCHEME.json,in_place:SCHEME.json:1

``network.safetensors`` is what ``quantize_network.py`` made of the weights. Every row is a way to train, a scheme and,
if need be, another batch size; the others are measured against the first, seed by seed. All have the same learning
rate, in proportion to their batch size: that it serves both is what quantization-aware scaling is for. The same command
goes on where it was stopped.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.data_sets import DataName
from microtune.modules.int8.files import is_quantized_file
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies.paired_trainings import (
    Training,
    draw_comparison,
    log_to_wandb,
    opened_folder,
    print_report,
    train_and_compare,
)
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.plan import MOBILENET_V2, NAMED_SCHEMES, check_ranges, source_of_weights
from microtune.recipes.training.run_folder import new_folder
from microtune.recipes.training.schemes import FILLING_SCHEMES

log = logging.getLogger(__name__)

# a way to train, and the arguments of ``train`` that make it
WAYS: dict[str, dict[str, Any]] = {
    "float": {},
    "latent": {"weight_storage": "latent"},
    "in_place": {"weight_storage": "in_place"},
    "unscaled": {"weight_storage": "latent", "gradient_scaling": False},
    "in_place_unscaled": {"weight_storage": "in_place", "gradient_scaling": False},
}


def main(
    data: DataName,
    rows: str,
    network: str,
    weights: str = "none",
    data_dir: Path | None = None,
    data_options: dict[str, Any] | None = None,
    resolution: int = 96,
    width: float | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float | None = None,
    warmup_fraction: float = 0.1,
    seeds: int = 3,
    mcu: str = "stm32f746",
    processes: int = 1,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """Trains an int8 network and the one in floating point that it was, on the same seeds.

    Args:
        data: Name of the data set.
        rows: What is compared, separated by commas: a way to train, a scheme, and perhaps a batch size, as in
            float:scheme.json,in_place:scheme.json:1. Ways are float (the weights), and of the int8 network latent,
            in_place, unscaled (latent without quantization-aware scaling) and in_place_unscaled.
        network: The .safetensors file of the int8 network.
        weights: Of the network in floating point.
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        width: Multiplier of the channels of the network in floating point; by default that of the weights.
        epochs: Passes over the training split.
        batch_size: Samples per step, of rows that do not say another.
        learning_rate: At its highest, for batch_size; by default 0.1 / 256 x batch_size (Lin et al.).
        warmup_fraction: Part of all steps in which the learning rate rises; then it falls to zero as a cosine.
        seeds: Trainings of each row.
        mcu: Microcontroller whose budget the reports of the trainings stand beside; nothing is refused.
        processes: Trainings that run at once, one thread each.
        logger: Of the summary: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the comparison; by default a new one below runs/. Where the same comparison was begun, it
            goes on.
    """
    arguments = flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(batch_size=batch_size, seeds=seeds, processes=processes)
    check_ranges(arguments)
    if not is_quantized_file(network):
        raise UserError(f"network is {network!r}: give the .safetensors file of an int8 network")
    described = described_rows(rows, batch_size)
    if weights == "none" and any(way == "float" for way, _, _ in described.values()):
        raise UserError("a row trains in floating point: give what the int8 network was made of with --weights")
    out_dir = out_dir or new_folder(Path("runs") / "compare_int8")
    rate = 0.1 / 256 if learning_rate is None else learning_rate / batch_size
    of_data = {
        "name": data,
        "data_dir": None if data_dir is None else str(data_dir),
        "resolution": resolution,
        "options": data_options or {},
    }
    of_all = {"epochs": epochs, "warmup_fraction": warmup_fraction, "mcu": mcu}
    trainings = []
    for seed in range(seeds):
        for name, (way, scheme, size) in described.items():
            of_network = {"weights": weights, "width": width} if way == "float" else {"network": network}
            source = source_of_weights(of_network.get("network", MOBILENET_V2), of_network.get("weights", "none"))
            folder = out_dir / "runs" / f"{name.replace(', ', '-').replace(' ', '')}-seed{seed}"
            of_row = of_all | of_network | WAYS[way] | {"scheme": scheme}
            trainings.append(
                Training(name, seed, size, rate * size, str(folder), of_data | {"weights": source}, of_row)
            )
    with opened_folder(out_dir, arguments):
        results, report = train_and_compare(trainings, "peak", processes, out_dir)
        draw_comparison(report, f"{Path(network).stem} on {data}", out_dir / "comparison.png")
        log_to_wandb(logger, "compare_int8", results, report, out_dir, arguments)
    print_report(report, out_dir)
    return report


def described_rows(rows: str, batch_size: int) -> dict[str, tuple[str, str, int]]:
    """The rows that commas separate, by name.

    Example::

        described_rows("latent:full", 64)  # {"latent, full": ("latent", "full", 64)}
    """
    described: dict[str, tuple[str, str, int]] = {}
    for row in listed(rows):
        way, scheme, size = described_row(row, batch_size)
        name = f"{way}, {short_name(scheme)}" + (f", batch {size}" if size != batch_size else "")
        if name in described:
            raise UserError(f"two rows have the name {name!r}: leave one out, or give its scheme another file name")
        described[name] = way, scheme, size
    if not described:
        raise UserError("there is nothing to compare: give --rows such as float:full,in_place:full")
    return described


def short_name(scheme: str) -> str:
    """Of a scheme's file, without the network that it is for, which all rows have in common.

    Example::

        short_name("recipes/schemes/mobilenet_v2-w0.35_lin2022_99kb.json")  # "lin2022_99kb"
    """
    if scheme in NAMED_SCHEMES:
        return scheme
    return Path(scheme).stem.removeprefix(f"{UpdateScheme.load(scheme).network}_")


def described_row(row: str, batch_size: int) -> tuple[str, str, int]:
    """The way to train, the scheme and the batch size of a row such as ``in_place:scheme.json:1``.

    Example::

        described_row("latent:full", 64)  # ("latent", "full", 64)
    """
    way, _, rest = row.partition(":")
    scheme, colon, own = rest.rpartition(":")
    if not colon or not own.isdecimal():
        scheme, own = rest, str(batch_size)
    if way not in WAYS or not scheme or int(own) < 1:
        ways = ", ".join(WAYS)
        raise UserError(f"row {row!r} is none: give WAY:SCHEME or WAY:SCHEME:BATCH_SIZE, where WAY is one of {ways}")
    if scheme in FILLING_SCHEMES:
        raise UserError(
            f"row {row!r}: {scheme} is what fits, and copies of weights take room: give a scheme's JSON file"
        )
    if scheme not in NAMED_SCHEMES and not Path(scheme).is_file():
        raise UserError(f"row {row!r} has no scheme: give a JSON file, classifier or full")
    return way, scheme, int(own)


if __name__ == "__main__":
    run_recipe(main)
