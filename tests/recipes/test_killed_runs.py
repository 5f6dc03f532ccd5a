"""A run that is killed ends, resumed, as one never killed: in floating point and in int8."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EPOCHS = 8
# recipes side by side, for which Lightning is imported once; prints the process of each
SIDE_BY_SIDE = """
import json, os, runpy, sys
import microtune.recipes.training.run
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        os._exit(0)
    print(child, flush=True)
for _ in json.loads(sys.argv[1]):
    child, status = os.wait()
    print(child, os.waitstatus_to_exitcode(status), flush=True)
"""
RECIPE = Path(__file__).parents[2] / "recipes/train_cifar.py"


@pytest.fixture
def runs(tiny_run, write_network) -> dict[str, dict]:
    """The arguments of each."""
    run = tiny_run("train_cifar") | {"epochs": EPOCHS}
    int8 = {"network": str(write_network("train_cifar")), "learning_rate": 0.01}
    return {"float": run | {"momentum": 0.9}, "int8": run | int8}


@pytest.fixture
def killed(runs, as_words, tmp_path) -> tuple[dict[str, Path], str]:
    """Their folders, and what they printed to standard error before they were killed: each after its first epoch."""
    folders = {name: tmp_path / f"killed_{name}" for name in runs}
    commands = [[str(RECIPE), *as_words(run | {"out_dir": folders[name]})] for name, run in runs.items()]
    starter = subprocess.Popen(
        [sys.executable, "-c", SIDE_BY_SIDE, json.dumps(commands)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = {}
    try:
        for name in runs:
            children[name] = int(starter.stdout.readline())
        waited_until = time.monotonic() + 100
        while children:
            assert starter.poll() is None, starter.stderr.read()
            assert time.monotonic() < waited_until
            for name in [name for name in children if (folders[name] / "last.ckpt").exists()]:
                os.kill(children.pop(name), signal.SIGKILL)
            time.sleep(0.002)
        output, errors = starter.communicate(timeout=100)
    finally:
        for child in children.values():
            os.kill(child, signal.SIGKILL)
        starter.kill()
    statuses = [int(line.split()[-1]) for line in output.splitlines() if " " in line]
    assert statuses == [-signal.SIGKILL] * len(runs)
    return folders, errors


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
