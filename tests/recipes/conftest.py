"""Recipes called as from the command line."""

import dataclasses
import functools
import importlib
import json
import logging
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from wandb.proto import wandb_internal_pb2

from microtune.modules.classifier import Classifier
from microtune.modules.int8.files import write_quantized_network
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.command_line import called_with, run_recipe
from microtune.recipes.training.networks import describe_network

ROOT = Path(__file__).parents[2]
TRAINING_RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("train_*.py"))
BLOCK_BYTES = 32768  # of a LevelDB log


def file_of(recipe: str) -> Path:
    """The file of a recipe or of a study."""
    paths = ROOT / f"recipes/{recipe}.py", ROOT / f"recipes/studies/{recipe}.py"
    (found,) = filter(Path.exists, paths)
    return found


def imported(recipe: str) -> ModuleType:
    """The module of a recipe or of a study."""
    return importlib.import_module(".".join(("microtune", *file_of(recipe).relative_to(ROOT).with_suffix("").parts)))


@dataclasses.dataclass
class Ended:
    """How a recipe ended: its exit status, and what it printed."""

    status: int
    output: str
    errors: str


@pytest.fixture(autouse=True)
def quiet_logs():
    """Puts back what recipes, which own their process, do to the loggers of it."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric", "wandb")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (propagate, level) in zip(loggers, before, strict=True):
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture
def command(monkeypatch, capfd) -> Callable[..., Ended]:
    """Calls ``command("train_cifar", "--epochs", 2)`` in this process."""

    def call(recipe: str, *words: Any) -> Ended:
        main = imported(recipe).main
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *map(str, words)])
        capfd.readouterr()
        status = 0
        try:
            run_recipe(main)
        except SystemExit as ended:
            status = ended.code
        return Ended(status, *capfd.readouterr())

    return call


def all_files(folder: Path) -> dict[Path, bytes | None]:
    """What lies in a folder, and what it holds."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An own current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def refused(command, here) -> Callable[..., str]:
    """Asserts that a recipe refuses these words with one line, which matches, and writes nothing; returns the line."""

    def check(message, recipe, *words):
        before = all_files(here)
        ended = command(recipe, *words)
        assert ended.status == 2
        assert ended.output == ""
        assert ended.errors.startswith(f"{recipe}.py: error: ")
        assert ended.errors.count("\n") == 1
        assert re.search(message, ended.errors), ended.errors
        assert all_files(here) == before
        return ended.errors

    return check


def start_process(*words: Any, **environment: str) -> subprocess.Popen:
    """Starts Python with these words, closed standard input and as many threads as this process has."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, **environment},
    )


@pytest.fixture(scope="session")
def process() -> Callable[..., Ended]:
    """Runs ``process("train_cifar", "--epochs", 2)`` in a process of its own; keywords are environment variables."""

    def call(recipe: str, *words: Any, **environment: str) -> Ended:
        child = start_process(file_of(recipe), *words, **environment)
        output, errors = child.communicate(timeout=120)
        return Ended(child.returncode, output, errors)

    return call


@pytest.fixture(scope="session")
def start_recipe() -> Callable[..., subprocess.Popen]:
    """Starts a recipe in a process of its own and leaves it running."""
    return lambda recipe, *words: start_process(file_of(recipe), *words)


@pytest.fixture(scope="session")
def tiny_run(
    tiny_cifar, tiny_images, tiny_imagenet, tiny_speech_commands, tiny_mswc, scheme_file
) -> Callable[[str], dict[str, Any]]:
    """The arguments of a training recipe's ``main`` for a run of about a second."""
    of_recipe = {
        "train_cifar": {"data_dir": tiny_cifar, "resolution": 32},
        "train_image_folder": {"data_dir": tiny_images, "resolution": 32},
        "train_imagenet": {
            "data_dir": tiny_imagenet,
            "resolution": 32,
            "scheme": str(scheme_file),
            "allow_oversize": True,
        },
        "train_mswc": {"data_dir": tiny_mswc, "languages": "ar"},
        "train_speech_commands": {"data_dir": tiny_speech_commands, "task": "words10"},
    }

    def arguments(recipe: str) -> dict[str, Any]:
        values = {"epochs": 3, "batch_size": 16, "num_workers": 0, "learning_rate": 0.05, "scheme": "sub_tensor"}
        return {**values, **of_recipe[recipe], "accelerator": "cpu", "logger": "none"}

    return arguments


@pytest.fixture(scope="session")
def as_words() -> Callable[[dict[str, Any]], list[str]]:
    """Arguments as words of the command line."""
    return lambda arguments: [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def called() -> Callable[..., dict[str, Any]]:
    """Calls ``called("train_cifar", epochs=2)``: a recipe with flat arguments, as the command line has them."""
    return lambda recipe, **arguments: called_with(imported(recipe).main, arguments)


@pytest.fixture(scope="session")
def finished_once(called, made_once) -> Callable[..., Path]:
    """The folder of a run that nothing interrupts, one for all tests: ``finished_once("name", "train_cifar", ...)``."""
    return lambda name, recipe, **arguments: made_once(
        name, lambda out_dir: called(recipe, **arguments, out_dir=out_dir)
    )


@pytest.fixture(scope="session")
def finished_runs(tiny_run, finished_once) -> dict[str, Path]:
    """The folder of a finished run of every training recipe."""
    return {recipe: finished_once(f"finished_{recipe}", recipe, **tiny_run(recipe)) for recipe in TRAINING_RECIPES}


@pytest.fixture(scope="session")
def unfolded_run(tiny_run, finished_once) -> Path:
    """The folder of a finished run from scratch, with batch norm, whose width is none that is usual by default."""
    return finished_once("unfolded", "train_cifar", **tiny_run("train_cifar") | {"scheme": "none", "width": 0.5})


@pytest.fixture(scope="session")
def report_of() -> Callable[[Path], dict[str, Any]]:
    """A run's report."""
    return lambda folder: json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def checkpoint_of() -> Callable[[Path], dict[str, Any]]:
    """A run's checkpoint."""
    return lambda folder: torch.load(folder / "last.ckpt", weights_only=True)


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The weights in a run's checkpoint."""
    return lambda folder: torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="session")
def scheme_file(made_once) -> Path:
    """A scheme like the paper's of 99 KiB: the expanding convolutions of the last eight blocks."""
    convolutions = find_operations(mobilenet_v2(0.35, num_classes=10), (3, 32, 32)).convolutions
    ratios = {27: 1, 30: 1, 33: 1, 36: 1, 39: 1, 42: 0.125, 45: 0.5, 48: 1}
    weights = {convolutions[index].name: ratio for index, ratio in ratios.items()}
    scheme = UpdateScheme("mobilenet_v2-w0.35", 25, weights)
    return made_once("scheme", lambda folder: scheme.save(folder / "scheme_99kb.json")) / "scheme_99kb.json"


@pytest.fixture
def write_network(small_graph, small_tensors, tmp_path) -> Callable[..., Path]:
    """Writes the small int8 network for the data of a recipe, perhaps with changes of its graph; returns its file."""

    def write(recipe, **changes):
        graph, tensors = small_graph, small_tensors
        if recipe in ("train_mswc", "train_speech_commands"):
            one_channel = dataclasses.replace(graph.first_conv, in_channels=1)
            changes |= {"input_shape": (1, 97, 40), "normalization": None, "first_conv": one_channel}
            tensors = tensors | {"first_conv.weight": tensors["first_conv.weight"][:, :1].contiguous()}
        write_quantized_network(tmp_path / "small.safetensors", dataclasses.replace(graph, **changes), tensors)
        return tmp_path / "small.safetensors"

    return write


@pytest.fixture(scope="session")
def small_table(tmp_path_factory) -> Path:
    """Contributions of random gains: of MobileNetV2-0.35's last 18 biases and the expanding convolutions in them."""
    rng = random.Random(0)
    convolutions = describe_network("none", (3, 32, 32), 10).operations.convolutions[-18:]
    rows = [Contribution("bias", depth, "", 0.0, rng.gauss(0.01, 0.01), 0.0, 1) for depth in range(1, 19)]
    rows += [
        Contribution("weight", 18, convolution.name, ratio, rng.gauss(0.01, 0.01), 0.0, 1)
        for convolution in convolutions
        if is_expanding(convolution)
        for ratio in (0.125, 0.25, 0.5, 1.0)
    ]
    path = tmp_path_factory.mktemp("table") / "contributions.csv"
    ContributionTable(tuple(rows)).save(path)
    return path


@pytest.fixture
def interrupt(monkeypatch) -> Callable[..., None]:
    """Lets the next run fail in the second step of the given epoch."""

    def at(epoch: int, exception: BaseException | type[BaseException] | None = None) -> None:
        def training_step(module, batch, batch_index):
            if module.current_epoch == epoch and batch_index == 1:
                monkeypatch.setattr(Classifier, "training_step", original)
                raise exception or RuntimeError("interrupted by the test")
            return original(module, batch, batch_index)

        original = Classifier.training_step
        monkeypatch.setattr(Classifier, "training_step", training_step)

    return at


@pytest.fixture
def limited(monkeypatch) -> Callable[..., None]:
    """Lets the trainings of a test end early: ``limited(limit_train_batches=1)`` as Lightning's Trainer takes it."""
    return lambda **limits: monkeypatch.setattr(
        "microtune.recipes.training.run.Trainer", functools.partial(Trainer, **limits)
    )


@pytest.fixture(scope="session")
def evaluated() -> Callable[[Classifier, LightningDataModule], tuple[float, float]]:
    """Top-1 and cross entropy of a plain forward pass over a data module's test split."""

    def measure(module: Classifier, data: LightningDataModule) -> tuple[float, float]:
        data.setup()
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
        samples, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            logits = module.eval()(samples)
        return (logits.argmax(1) == labels).float().mean().item(), module.loss(logits, labels).item()

    return measure


def read_records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a run-*.wandb file, which is a LevelDB log with a header of seven bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < 7:
            position += left_in_block
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


@pytest.fixture(scope="session")
def offline_run() -> Callable[[Path], SimpleNamespace]:
    """Reads the offline run of Weights & Biases in a recipe's folder back from its file."""

    def items(record_items):
        """Nested keys, joined by slashes, and values."""
        return {"/".join([one.key] if one.key else one.nested_key): json.loads(one.value_json) for one in record_items}

    def read(out_dir):
        (file,) = out_dir.glob("wandb/offline-run-*/run-*.wandb")
        records = list(read_records(file))
        return SimpleNamespace(
            files=file.parent / "files",
            config={k: v for r in records if r.HasField("config") for k, v in items(r.config.update).items()},
            history=[items(r.history.item) for r in records if r.HasField("history")],
            summary={k: v for r in records if r.HasField("summary") for k, v in items(r.summary.update).items()},
            artifacts=[r.artifact for r in records if r.HasField("artifact")],
        )

    return read
