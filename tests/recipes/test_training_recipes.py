"""Every training recipe runs, leaves a whole folder behind, and reproduces and resumes to the bit."""

import csv
import functools
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from microtune.datamodules.cifar import CIFAR
from microtune.datamodules.image_folder import ImageFolder
from microtune.datamodules.imagenet import ImageNet
from microtune.datamodules.mswc import MSWC
from microtune.datamodules.speech_commands import COMMANDS, SpeechCommands
from microtune.modules.classifier import Classifier
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.networks.pretrained_weights import NORMALIZATION
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.options import (
    BudgetOptions,
    DeviceOptions,
    Int8Options,
    NetworkOptions,
    OptimizationOptions,
    RunOptions,
)

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("train_*.py"))
REPORT_KEYS = {"top1", "val_top1", "loss", "train_samples", "val_samples", "test_samples", "classes", "seconds"}
SAMPLES = {
    "train_cifar": [90, 10, 20, 10],
    "train_image_folder": [42, 6, 12, 3],
    "train_imagenet": [33, 3, 12, 1000],
    "train_mswc": [24, 6, 12, 3],
    "train_speech_commands": [60, 20, 20, 10],
}
ONE_BATCH = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}  # of each split

# Lightning's remarks: few steps per epoch, a folder that is not empty, no workers
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def read_metrics(folder, name):
    """All values of one metric, in the order in which they were logged; resumed runs have a file per start."""
    rows = []
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open() as opened:
            rows += list(csv.DictReader(opened))
    return [float(row[name]) for row in rows if row.get(name)]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny_operations():
    return find_operations(mobilenet_v2(0.35, num_classes=10), (3, 32, 32))


def test_the_training_recipes():
    assert RECIPES == ["train_cifar", "train_image_folder", "train_imagenet", "train_mswc", "train_speech_commands"]


@each_recipe
def test_run_folder_is_whole(recipe, finished_runs, tiny_run):
    folder = finished_runs[recipe]
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "scheme.json", "last.ckpt", "metrics", "memory.png", "report.json")
    }
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = tiny_run(recipe) | {"out_dir": str(folder), "data_dir": str(tiny_run(recipe)["data_dir"])}
    assert {name: config[name] for name in expected} == expected
    UpdateScheme.load(folder / "scheme.json").check(tiny_operations().convolutions, "mobilenet_v2-w0.35")
    with Image.open(folder / "memory.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)
    assert len(read_metrics(folder, "val/top1")) == 3 + 1  # after every epoch, and of the weights that are tested
    assert len(read_metrics(folder, "test/top1")) == 1


@each_recipe
def test_report(recipe, finished_runs, report_of):
    report = report_of(finished_runs[recipe])
    assert report.keys() >= REPORT_KEYS
    assert [report[name] for name in ("train_samples", "val_samples", "test_samples", "classes")] == SAMPLES[recipe]
    assert ("top5" in report) == (report["classes"] > 5)
    assert report["seconds"] > 0
    assert report["mcu"] == "stm32f746"
    assert report["budget_bytes"] == 288 * 1024
    assert report["fits"] == (report["peak_memory_bytes"] <= report["budget_bytes"])
    # a classifier of 1000 classes alone, with its gradient, is 875 KiB
    assert report["fits"] == (recipe != "train_imagenet")


@each_recipe
def test_report_is_about_the_checkpoint(recipe, finished_runs, tiny_run, report_of):
    """The accuracy and the loss are those of a plain forward pass of what ``last.ckpt`` holds."""
    data_dir = tiny_run(recipe)["data_dir"]
    of_images = {"resolution": 32, "normalization": NORMALIZATION["symmetric"], "num_workers": 0}
    data = {
        "train_cifar": lambda: CIFAR(data_dir, **of_images),
        "train_image_folder": lambda: ImageFolder(data_dir, **of_images),
        "train_imagenet": lambda: ImageNet(data_dir, **of_images),
        "train_mswc": lambda: MSWC(data_dir, ["ar"]),
        "train_speech_commands": lambda: SpeechCommands(data_dir, "words10"),
    }[recipe]()
    data.setup()
    module = Classifier.load_from_checkpoint(finished_runs[recipe] / "last.ckpt").eval()
    report = report_of(finished_runs[recipe])
    for loader, name in ((data.test_dataloader(), "top1"), (data.val_dataloader(), "val_top1")):
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            logits = module(images)
        assert report[name] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
        if name == "top1":
            assert report["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


@each_recipe
def test_saved_configuration_reproduces_the_run(recipe, finished_runs, command, weights_of, report_of, tmp_path):
    ended = command(recipe, "--config", finished_runs[recipe] / "config.yaml", "--out_dir", tmp_path / "again")
    assert ended.status == 0
    assert_equal(weights_of(finished_runs[recipe]), weights_of(tmp_path / "again"))
    first, again = report_of(finished_runs[recipe]), report_of(tmp_path / "again")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@each_recipe
def test_another_seed_begins_elsewhere(recipe, limited, called, finished_runs, tiny_run, weights_of, tmp_path):
    limited(**ONE_BATCH)
    called(recipe, **tiny_run(recipe) | {"epochs": 1}, seed=1, out_dir=tmp_path / "run")
    one, other = weights_of(finished_runs[recipe]), weights_of(tmp_path / "run")
    for layer in ("classifier.1", "features.0.0"):  # of which the second is frozen: its fresh weights are others
        assert not torch.equal(one[f"net.{layer}.weight"], other[f"net.{layer}.weight"])


@each_recipe
def test_resumed_run_ends_as_one_never_stopped(
    recipe, finished_runs, tiny_run, interrupt, weights_of, called, report_of, tmp_path
):
    run = {**tiny_run(recipe), "out_dir": tmp_path / "run"}
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        called(recipe, **run)
    started = (tmp_path / "run/config.yaml").read_bytes()
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["epoch"] == 0
    assert not (tmp_path / "run/report.json").exists()

    report = called(recipe, **run, resume=True)
    assert_equal(weights_of(finished_runs[recipe]), weights_of(tmp_path / "run"))
    assert {**report, "seconds": 0} == {**report_of(finished_runs[recipe]), "seconds": 0}
    assert len(read_metrics(tmp_path / "run", "val/top1")) == 3 + 1
    # so that the configuration still reproduces the run
    assert (tmp_path / "run/config.yaml").read_bytes() == started


# SGD's under a scheme, sub_tensor and mask, is in tests/callbacks/test_sparse_update.py and test_killed_runs.py
@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"scheme": "none", "weight_decay": 1e-4}])
def test_optimizer_state_is_resumed(options, tiny_run, interrupt, weights_of, called, tmp_path):
    run = {**tiny_run("train_cifar"), "epochs": 2, **options}
    called("train_cifar", **run, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        called("train_cifar", **run, out_dir=tmp_path / "run")
    called("train_cifar", **run, out_dir=tmp_path / "run", resume=True)
    assert_equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


def test_run_that_failed_before_its_first_checkpoint_is_resumed(
    finished_runs, tiny_run, interrupt, weights_of, called, tmp_path
):
    run = {**tiny_run("train_cifar"), "out_dir": tmp_path / "run"}
    interrupt(epoch=0)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        called("train_cifar", **run)
    assert not (tmp_path / "run/last.ckpt").exists()
    called("train_cifar", **run, resume=True)
    assert_equal(weights_of(finished_runs["train_cifar"]), weights_of(tmp_path / "run"))


def test_interruption_exits_with_130_and_says_how_to_go_on(tiny_run, as_words, interrupt, command, here):
    """With the folder, which the recipe chose, and in words that can be typed."""
    handler = signal.getsignal(signal.SIGINT)
    interrupt(epoch=1, exception=KeyboardInterrupt)
    ended = command("train_cifar", *as_words(tiny_run("train_cifar")))
    signal.signal(signal.SIGINT, handler)
    assert ended.status == 130
    assert "Traceback" not in ended.errors
    words = ended.errors.splitlines()[-1].removeprefix("stopped; go on with ")
    assert command("train_cifar", *words.split()).status == 0
    assert len(list(here.glob("runs/train_cifar/*/report.json"))) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 4}, "was started with epochs 3, not 4"),
        ({"learning_rate": 0.01}, "was started with learning_rate 0.05, not 0.01"),
        ({"resolution": 48}, "was started with resolution 32, not 48"),
    ],
)
def test_resume_with_other_arguments_is_refused(changed, message, finished_runs, tiny_run, as_words, command, tmp_path):
    folder = shutil.copytree(finished_runs["train_cifar"], tmp_path / "run")
    (folder / "report.json").unlink()
    before = contents(folder)
    ended = command("train_cifar", *as_words(tiny_run("train_cifar") | {"out_dir": folder} | changed), "--resume")
    assert ended.status == 2
    assert message in ended.errors
    assert ended.errors.count("\n") == 1
    assert contents(folder) == before


def test_resume_with_a_changed_scheme_file_is_refused(tiny_run, as_words, interrupt, command, tmp_path):
    scheme_file = tmp_path / "scheme.json"
    UpdateScheme("mobilenet_v2-w0.35", 3).save(scheme_file)
    words = as_words(tiny_run("train_cifar") | {"scheme": scheme_file, "out_dir": tmp_path / "run"})
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        command("train_cifar", *words)
    UpdateScheme("mobilenet_v2-w0.35", 4).save(scheme_file)
    before = contents(tmp_path / "run")
    ended = command("train_cifar", *words, "--resume")
    assert ended.status == 2
    assert "was started with another scheme" in ended.errors
    assert contents(tmp_path / "run") == before


def test_resume_of_a_finished_run_is_refused(finished_runs, command):
    folder = finished_runs["train_cifar"]
    before = contents(folder)
    ended = command("train_cifar", "--config", folder / "config.yaml", "--resume")
    assert ended.status == 2
    assert f"the run in {folder} is finished: its results are in {folder / 'report.json'}" in ended.errors
    assert contents(folder) == before


def test_run_is_not_written_over(finished_runs, command):
    folder = finished_runs["train_cifar"]
    before = contents(folder)
    ended = command("train_cifar", "--config", folder / "config.yaml")
    assert ended.status == 2
    assert f"{folder} is not empty: give another --out_dir, or --resume" in ended.errors
    assert contents(folder) == before


def test_default_folders_of_runs_of_the_same_second(tiny_run, monkeypatch, limited, called, tmp_path):
    limited(**ONE_BATCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("microtune.recipes.training.run_folder.time.strftime", lambda _: "20261120-060000")
    for _ in range(2):
        called("train_cifar", **tiny_run("train_cifar") | {"epochs": 1})
    names = sorted(path.name for path in (tmp_path / "runs/train_cifar").iterdir())
    assert names == ["20261120-060000", "20261120-060000-2"]


def test_memory_figures_are_those_of_the_training(scheme_file, tiny_run, limited, called, tmp_path):
    """Which training holds what is in test_plan.py."""
    limited(**ONE_BATCH)
    options = {"scheme": str(scheme_file), "allow_oversize": True, "momentum": 0.9, "accumulate_batches": 2}
    report = called("train_cifar", **tiny_run("train_cifar") | options, out_dir=tmp_path / "run")
    scheme = UpdateScheme.load(scheme_file)
    counted = PeakMemory(tiny_operations(), optimizer_state="momentum", gradient_accumulation=True)
    assert report["peak_memory_bytes"] == counted.peak_bytes(scheme)
    assert UpdateScheme.load(tmp_path / "run/scheme.json") == scheme


def test_scheme_that_does_not_fit(tiny_run, as_words, limited, command, report_of, tmp_path):
    words = as_words(tiny_run("train_cifar") | {"scheme": "full", "epochs": 1, "out_dir": tmp_path / "run"})
    ended = command("train_cifar", *words)
    assert ended.status == 2
    assert ended.errors.count("\n") == 1
    scheme = UpdateScheme("any", 51, {c.name: 1.0 for c in tiny_operations().convolutions})
    needed = f"{PeakMemory(tiny_operations()).peak_bytes(scheme) / 1024:.1f} KiB"
    assert f"one training step needs {needed}" in ended.errors
    assert "stm32f746 has 288.0 KiB (320.0 KiB less a reserve of 32.0 KiB)" in ended.errors
    assert "most of the extra memory goes to features.17.conv.2 (37.5 KiB), " in ended.errors
    assert "--allow_oversize" in ended.errors
    assert not (tmp_path / "run").exists()

    limited(**ONE_BATCH)
    assert command("train_cifar", *words, "--allow_oversize").status == 0
    report = report_of(tmp_path / "run")
    assert not report["fits"]
    assert report["peak_memory_bytes"] > report["budget_bytes"]


def test_flash_that_is_too_small(tiny_run, as_words, command, tmp_path):
    words = as_words(tiny_run("train_cifar") | {"flash_bytes": 100_000, "out_dir": tmp_path / "run"})
    ended = command("train_cifar", *words)
    assert ended.status == 2
    assert "of flash, but stm32f746 has 97.7 KiB" in ended.errors
    assert not (tmp_path / "run").exists()


def test_without_a_scheme_everything_is_trained_with_batch_norm(unfolded_run, weights_of, report_of):
    assert "peak_memory_bytes" not in report_of(unfolded_run)
    assert not (unfolded_run / "scheme.json").exists()
    assert "net.features.0.1.running_mean" in weights_of(unfolded_run)


def test_class_names_are_in_the_checkpoint(finished_runs, checkpoint_of):
    found = {
        recipe: checkpoint_of(folder)["hyper_parameters"]["class_names"] for recipe, folder in finished_runs.items()
    }
    assert found["train_cifar"] == [f"class {number}" for number in range(10)]
    assert found["train_image_folder"] == ["blue", "green", "red"]
    assert found["train_speech_commands"] == list(COMMANDS)
    assert found["train_mswc"] == sorted(("واحد", "اثنان", "ثلاثة"))
    assert len(found["train_imagenet"]) == 1000
    assert found["train_imagenet"][0] == "tench"


def test_options_that_recipes_share_are_flags_in_groups(command):
    groups = (NetworkOptions, BudgetOptions, OptimizationOptions, Int8Options, DeviceOptions, RunOptions)
    for recipe in RECIPES:
        ended = command(recipe, "--help")
        assert ended.status == 0
        for group in groups:
            assert f"\n{group.__doc__.splitlines()[0]}:\n" in ended.output
            for option in fields(group):
                assert f"--{option.name} " in ended.output, option.name


def train_on_real_images(called, recipe, data_dir, limited, out_dir, **limits):
    """One epoch from Keras' weights at 64 px; ``limits`` of Lightning's Trainer make it a short one."""
    limited(**limits)
    weights = data_dir.parent / "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"
    shared = {"resolution": 64, "epochs": 1, "num_workers": 0, "logger": "none", "accelerator": "cpu"}
    called(recipe, data_dir=data_dir, weights=str(weights), **shared, out_dir=out_dir)


def test_loss_falls_on_real_cifar(shared_data, called, limited, report_of, tmp_path):
    limits = {"limit_train_batches": 60, "limit_val_batches": 2, "limit_test_batches": 6}
    train_on_real_images(called, "train_cifar", shared_data / "cifar10", limited, tmp_path / "run", **limits)
    losses = read_metrics(tmp_path / "run", "train/loss")
    assert len(losses) == 6
    assert losses[0] > 1.8
    assert losses[-1] < 0.8 * losses[0]
    assert report_of(tmp_path / "run")["top1"] > 0.3  # chance is 0.1
    assert report_of(tmp_path / "run")["train_samples"] == 5850


def test_loss_falls_on_real_flowers(shared_data, called, limited, report_of, tmp_path):
    limits = {"limit_val_batches": 1, "limit_test_batches": 6}
    train_on_real_images(called, "train_image_folder", shared_data / "flowers17", limited, tmp_path / "run", **limits)
    losses = read_metrics(tmp_path / "run", "train/loss")
    assert losses[-1] < 0.8 * losses[0]
    assert report_of(tmp_path / "run")["top1"] > 0.4  # chance is 0.06
