"""A run that is killed ends, resumed, as one never killed: in floating point and in int8."""

import csv
import logging
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EPOCHS = 5
RECIPE = Path(__file__).parents[2] / "recipes/train_cifar.py"


@pytest.fixture
def runs(tiny_run, write_network) -> dict[str, dict]:
    """The arguments of each."""
    run = tiny_run("train_cifar") | {"epochs": EPOCHS}
    int8 = {"network": str(write_network("train_cifar")), "learning_rate": 0.01}
    return {"float": run | {"momentum": 0.9}, "int8": run | int8}


def run_as_program(words: list[str], errors: Path) -> None:
    """What a forked process does."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    logging.getLogger().handlers.clear()  # pytest's
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


@pytest.fixture
def killed(fork, runs, as_words, tmp_path) -> tuple[dict[str, Path], str]:
    """Their folders, and what they printed to standard error before they were killed: each after its first epoch."""
    folders = {name: tmp_path / f"killed_{name}" for name in runs}
    children = {}
    for name, run in runs.items():
        words = [str(RECIPE), *as_words(run | {"out_dir": folders[name]})]
        children[name] = fork.Process(target=run_as_program, args=(words, tmp_path / f"{name}.errors"), daemon=True)
        children[name].start()
    waited_until = time.monotonic() + 100
    while any(child.is_alive() for child in children.values()):
        assert time.monotonic() < waited_until
        for name, child in children.items():
            if (folders[name] / "last.ckpt").exists():
                child.kill()
        time.sleep(0.002)
    errors = {name: (tmp_path / f"{name}.errors").read_text() for name in runs}
    assert {name: child.exitcode for name, child in children.items()} == dict.fromkeys(runs, -signal.SIGKILL), errors
    return folders, errors["int8"]


def test_killed_runs_end_as_ones_never_killed(killed, runs, called, checkpoint_of, report_of, tmp_path):
    folders, errors = killed
    assert "the int8 network is trained with quantization-aware scaling, its weights in_place\n" in errors
    for name, folder in folders.items():
        assert not (folder / "report.json").exists()
        finished_epoch = checkpoint_of(folder)["epoch"]
        assert finished_epoch < EPOCHS - 1

        called("train_cifar", **runs[name], out_dir=folder, resume=True)
        whole = tmp_path / f"whole_{name}"
        called("train_cifar", **runs[name], out_dir=whole)
        states = [checkpoint_of(one)["state_dict"] for one in (folder, whole)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        assert report_of(folder)["top1"] == report_of(whole)["top1"]
        if name == "int8":
            networks = [(one / "network.safetensors").read_bytes() for one in (folder, whole)]
            assert networks[0] == networks[1]
        # it went on, and did not start anew
        with (folder / "metrics/version_1/metrics.csv").open() as opened:
            assert int(next(csv.DictReader(opened))["epoch"]) == finished_epoch + 1
