"""Says what holds training back: samples per second of each data set's loader, and of a sparse training step.

    uv run recipes/studies/benchmark_data.py --cifar data --imagenet imagenet --image_folder flowers \\
        --speech_commands data --mswc mswc --languages ar

Half a minute on two cores of an AMD EPYC, where every loader is ahead of the step: by 1.3 to 1.4 times where two
processes decode photographs, by more than six times where the data is held in memory.
"""

import json as json_format
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from microtune.datamodules.contract import ClassificationData
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import check_at_least_one, listed, run_recipe
from microtune.recipes.training.networks import describe_network
from microtune.recipes.training.step_time import prepared, training_step

PAPERS_SCHEME = Path(__file__).parents[1] / "schemes/mobilenet_v2-w0.35_lin2022_99kb.json"


def main(
    cifar: Path | None = None,
    image_folder: Path | None = None,
    imagenet: Path | None = None,
    speech_commands: Path | None = None,
    mswc: Path | None = None,
    languages: str = "en",
    resolution: int = 128,
    batch_size: int = 32,
    num_workers: int = 2,
    width: float = 0.35,
    scheme: str = str(PAPERS_SCHEME),
    batches: int = 20,
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Says what holds training back: samples per second of each data set's loader, and of a sparse training step.

    Args:
        cifar: Folder that holds cifar-10-batches-py; a data set without its folder is left out.
        image_folder: Folder that holds a folder per class with its images.
        imagenet: Folder that holds train/ or val/, with a folder per wnid.
        speech_commands: Folder that holds SpeechCommands/.
        mswc: Folder that holds a folder per language.
        languages: Languages of MSWC, separated by commas.
        resolution: Height and width of images in pixels.
        batch_size: Number of samples per step.
        num_workers: Number of processes that decode images; sets that are held in memory are loaded without.
        width: Multiplier of MobileNetV2's channels.
        scheme: Update scheme of the step, a JSON file; by default the paper's of 99 KB.
        batches: Batches per measurement of a loader, or as many as an epoch has.
        rounds: Measurements of each, of which the median counts; they take turns.
        json: Whether to print one JSON object and nothing else.
    """
    check_at_least_one(batches=batches, rounds=rounds)
    if num_workers < 0:
        raise UserError(f"num_workers is {num_workers}: give 0 or more")

    # what cannot be is refused by now; these take seconds to import
    from microtune.datamodules.cifar import CIFAR
    from microtune.datamodules.digits import Digits
    from microtune.datamodules.image_folder import ImageFolder
    from microtune.datamodules.imagenet import ImageNet
    from microtune.datamodules.mswc import MSWC
    from microtune.datamodules.speech_commands import SpeechCommands

    in_memory = {"batch_size": batch_size, "num_workers": 0}
    decoding = {"resolution": resolution, "batch_size": batch_size, "num_workers": num_workers}
    sources: dict[str, ClassificationData] = {"digits": Digits(resolution=32, batch_size=batch_size, augment=True)}
    if cifar is not None:
        sources["cifar"] = CIFAR(cifar, resolution=resolution, **in_memory)
    if image_folder is not None:
        sources["image_folder"] = ImageFolder(image_folder, **decoding)
    if imagenet is not None:
        sources["imagenet"] = ImageNet(imagenet, **decoding)
    if speech_commands is not None:
        sources["speech_commands"] = SpeechCommands(speech_commands, "words12", **in_memory)
    if mswc is not None:
        sources["mswc"] = MSWC(mswc, listed(languages), **in_memory)

    report = {"threads": torch.get_num_threads(), "batch_size": batch_size, "data": {}}
    for name, data in sources.items():
        report["data"][name] = measure(data, width, scheme, batches, rounds)
    print(json_format.dumps(report, indent=2)) if json else print_table(report)


def measure(data: ClassificationData, width: float, scheme: str, batches: int, rounds: int) -> dict[str, Any]:
    """Samples per second of the loader, of what is left to do on the device, and of the sparse step."""
    from lightning.pytorch import LightningDataModule  # by need, as above

    started = time.perf_counter()
    data.prepare_data()
    data.setup()
    setup_seconds = time.perf_counter() - started
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = describe_network("none", data.input_shape, data.num_classes, width)
    update_scheme = described.load_scheme(scheme)
    plain = described.network.to(device, memory_format=torch.channels_last)
    ready = prepared(plain, update_scheme, described.operations, "sub_tensor")

    loader = data.train_dataloader()
    batch = tuple(part.to(device) for part in next(iter(loader)))
    samples, labels = data.on_after_batch_transfer(batch, 0)
    samples = samples.contiguous(memory_format=torch.channels_last)
    step = training_step(ready, samples, labels)
    has_front_end = type(data).on_after_batch_transfer is not LightningDataModule.on_after_batch_transfer
    for _ in range(2):
        step()
    rates: dict[str, list[float]] = {"loader": [], "front_end": [], "step": []}
    for round_ in range(rounds):
        rates["loader"].append(loaded_per_second(loader, round_, batches))
        time.sleep(loader.num_workers / 2)  # its processes still make the batches that they were asked for ahead
        if has_front_end:
            rates["front_end"].append(rate_of(lambda: data.on_after_batch_transfer(batch, 0), len(labels)))
        rates["step"].append(rate_of(step, len(labels)))
    loaded, stepped = median(rates["loader"]), median(rates["step"])
    return {
        "input_shape": list(data.input_shape),
        "num_workers": loader.num_workers,
        "setup_seconds": setup_seconds,
        "loader_samples_per_second": loaded,
        "front_end_samples_per_second": median(rates["front_end"]) if has_front_end else None,
        "step_samples_per_second": stepped,
        "loader_over_step": loaded / stepped,
    }


def loaded_per_second(loader: DataLoader, epoch: int, batches: int) -> float:
    """Samples per second of an epoch's batches, of which the first, made while the processes start, do not count."""
    loader.sampler.set_epoch(epoch)
    samples, started = 0, 0.0
    for number, batch in enumerate(loader):
        if number == loader.num_workers + 1:
            started = time.perf_counter()
        elif number > loader.num_workers + 1:
            samples += len(batch[0])
        if number == batches + loader.num_workers + 1:
            break
    if not samples:
        raise UserError(f"an epoch has {number + 1} batches, too few to measure: give a smaller --batch_size")
    return samples / (time.perf_counter() - started)


def rate_of(step: Callable[[], Any], samples: int, times: int = 10) -> float:
    """Samples per second of a call that works on so many of them."""
    started = time.perf_counter()
    for _ in range(times):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return samples * times / (time.perf_counter() - started)


def print_table(report: dict[str, Any]) -> None:
    """One row per data set."""
    table = Table(title="Samples per second")
    table.add_column("data", no_wrap=True)
    for name in ("input", "workers", "loader", "on the device", "sparse step", "loader / step", "bottleneck"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report["data"].items():
        front_end = row["front_end_samples_per_second"]
        table.add_row(
            name,
            " x ".join(map(str, row["input_shape"])),
            str(row["num_workers"]),
            f"{row['loader_samples_per_second']:,.0f}",
            "-" if front_end is None else f"{front_end:,.0f}",
            f"{row['step_samples_per_second']:,.0f}",
            f"{row['loader_over_step']:.2f}",
            "step" if row["loader_over_step"] >= 1 else "loader",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"each alone, on {report['threads']} threads, batch size {report['batch_size']}; "
        "'on the device' is what turns sound into spectrograms, between loader and step"
    )


if __name__ == "__main__":
    run_recipe(main)
