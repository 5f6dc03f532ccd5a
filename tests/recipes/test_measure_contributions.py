"""The measurement of contributions: complete, resumed and shared to the bit, and clear about wrong input."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from filelock import FileLock
from PIL import Image
from torch import nn

from microtune.datamodules.digits import Digits
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.measure_contributions import main
from microtune.recipes.search import trials as trial_setup
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.training.command_line import called_with

RECIPE = "measure_contributions"
EXPANDING = ("features.16.conv.0.0", "features.17.conv.0.0")  # within the last six convolutions
ALL = ("features.16.conv.0.0", "features.16.conv.1.0", "features.16.conv.2")
ALL += ("features.17.conv.0.0", "features.17.conv.1.0", "features.17.conv.2")
RATIOS = (0.25, 1.0)
ROWS = [("bias", "6", "", ""), ("bias", "2", "", ""), ("bias", "4", "", "")]
ROWS += [("weight", "6", layer, str(ratio)) for layer in EXPANDING for ratio in RATIOS]
GROUPS = [("bias", "0", "", ""), *ROWS[1::4]]  # the first update of each, four side by side
TRIALS = 2 * (len(ROWS) + 1)  # of two seeds; the classifier alone is no row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a folded network that knows the digits a little: from fresh weights no update gains anything."""
    data = Digits(resolution=32, augment=True)
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = mobilenet_v2(0.35, num_classes=10, in_channels=1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for images, labels in [*data.train_dataloader()] * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
    folded = fold_batch_norm(network.eval(), data.input_shape)
    path = tmp_path_factory.mktemp("weights") / "digits.ckpt"
    described = {"width": 0.35, "num_classes": 10, "in_channels": 1, "folded": True, "padding": "symmetric"}
    torch.save(
        {
            "state_dict": {f"net.{name}": value for name, value in folded.state_dict().items()},
            "hyper_parameters": {"network": described, "class_names": data.class_names, "input_shape": [1, 32, 32]},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def words(weights):
    """The words of a measurement of two seconds."""
    return (
        *("--data", "digits", "--weights", weights, "--resolution", 32, "--base_depth", 6, "--steps", 10),
        *("--learning_rate", 1.0, "--ratios", "0.25,1", "--bias_depths", "2,4", "--seeds", 2, "--logger", "none"),
    )


@pytest.fixture
def built_anew():
    """A recipe is a process of its own, which has built no trials yet."""
    trial_setup._trials.cache_clear()
    trial_setup._network_and_data.cache_clear()


@pytest.fixture(autouse=True)
def one_picture(whole, monkeypatch):
    """That of the first measurement is enough."""
    monkeypatch.setattr("microtune.recipes.measure_contributions.draw_contributions", lambda *_: None)


def claim_on(out_dir, group):
    """The file that is locked by the process that trains this group."""
    _, depth, layer, ratio = GROUPS[group]
    return out_dir / f".claims/{depth}-{layer}-{float(ratio or 0):g}.lock"


# forked from a process that has imported everything and done nothing: each import takes long
LAUNCHER = """
import os, sys
from pathlib import Path
import microtune.datamodules.digits, microtune.recipes.training.pretrained
from microtune.recipes.measure_contributions import main
from microtune.recipes.training.command_line import run_recipe
words, folders = sys.argv[1:-2], sys.argv[-2:]
for folder in folders:
    if not os.fork():
        for name, stream in (("output", 1), ("errors", 2)):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        Path(f"{folder}.pid").write_text(str(os.getpid()))
        sys.argv[1:] = [*words, "--out_dir", folder]
        run_recipe(main)
        sys.exit()
for _ in folders:
    os.wait()
"""


@dataclass
class Measuring:
    """A process that measures: where, and the claim on the references that it waits for."""

    out_dir: Path
    claim: FileLock
    launcher: subprocess.Popen

    def read(self, name):
        path = Path(f"{self.out_dir}.{name}")
        return path.read_text() if path.exists() else ""

    def go_on_until(self, holds, seconds=60):
        """Lets the process go on, and waits for what it is to do."""
        end = time.monotonic() + seconds
        while not holds():
            assert self.launcher.poll() is None or holds(), self.read("errors")
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture(scope="module", autouse=True)
def children(words, tmp_path_factory):
    """Two processes that wait for the claim on the references, as it takes long to import everything; and the claim."""
    folders = {name: tmp_path_factory.mktemp(name) / "out" for name in ("killed", "shared")}
    claims = {}
    for name, folder in folders.items():
        (folder / ".claims").mkdir(parents=True)
        claims[name] = FileLock(claim_on(folder, 0))
        claims[name].acquire()
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *map(str, words), *map(str, folders.values())],
        stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    yield {name: Measuring(folder, claims[name], launcher) for name, folder in folders.items()}
    for claim in claims.values():
        claim.release()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


@pytest.fixture(scope="module")
def killed(children):
    """The folder of a measurement whose process was killed in the middle."""
    child = children["killed"]
    child.claim.release()
    child.go_on_until(lambda: len(read(child.out_dir / "trials.csv")) > 4)
    os.kill(int(child.read("pid")), signal.SIGKILL)
    return child.out_dir


@pytest.fixture
def measure(command, words, built_anew):
    """Calls the recipe; returns what it printed."""

    def call(out_dir, *more):
        ended = command(RECIPE, *words, "--out_dir", out_dir, *more)
        assert ended.status == 0, ended.errors
        return ended.output

    return call


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a measurement that nothing interrupted."""
    shutil.copytree(whole, tmp_path / "finished")
    return tmp_path / "finished"


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The folder of a measurement that nothing interrupted."""
    arguments = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    defaults = {field.name: getattr(TrialSettings, field.name) for field in fields(TrialSettings)[3:]}
    arguments = {"data_dir": None, "data_options": {}} | defaults | arguments | {"weights": str(arguments["weights"])}
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    called_with(main, {**arguments, "out_dir": out_dir})
    return out_dir


def read(path):
    """The rows of a CSV file, of none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def made_here(output):
    contributions, total, made = map(
        int,
        re.search(r"^(\d+) contributions from (\d+) trials, (\d+) of them made here, in \d+ s$", output, re.M).groups(),
    )
    assert (contributions, total) == (len(ROWS), TRIALS)
    return made


def table_of(folder):
    return (folder / "contributions.csv").read_bytes()


# ---- what it writes


def test_table_is_complete(whole):
    with (whole / "contributions.csv").open() as file:
        assert file.readline() == "kind,bias_depth,layer,ratio,gain,gain_std,runs\n"
    rows = read(whole / "contributions.csv")
    assert [(row["kind"], row["bias_depth"], row["layer"], row["ratio"]) for row in rows] == ROWS
    assert {row["runs"] for row in rows} == {"2"}
    table = ContributionTable.load(whole / "contributions.csv")
    assert table.base_depth == 6
    assert {layer: tuple(gains) for layer, gains in table.weight_gains.items()} == dict.fromkeys(EXPANDING, RATIOS)


def test_trials_are_complete(whole):
    rows = read(whole / "trials.csv")
    assert list(rows[0]) == ["kind", "bias_depth", "layer", "ratio", "seed", "val_top1"]
    found = [(row["kind"], row["bias_depth"], row["layer"], row["ratio"], row["seed"]) for row in rows]
    of_bias = [("bias", "0", "", ""), *ROWS]
    wanted = {(kind, depth, layer, ratio or "0.0", seed) for kind, depth, layer, ratio in of_bias for seed in "01"}
    assert len(found) == len(wanted) == TRIALS
    assert set(found) == wanted
    for row in rows:
        assert (float(row["val_top1"]) * 143).is_integer() or float(row["val_top1"]) * 143 % 1 == pytest.approx(1)


def test_gains_are_those_of_the_trials(whole):
    """By hand: over the classifier alone, or over the biases of the base depth, of the same seed."""
    top1 = {}
    for row in read(whole / "trials.csv"):
        key = (int(row["bias_depth"]), row["layer"], float(row["ratio"]))
        top1.setdefault(key, {})[row["seed"]] = float(row["val_top1"])
    for row in read(whole / "contributions.csv"):
        of_update = top1[int(row["bias_depth"]), row["layer"], float(row["ratio"] or 0)]
        before = top1[6 if row["kind"] == "weight" else 0, "", 0.0]
        gains = [of_update[seed] - before[seed] for seed in ("0", "1")]
        assert float(row["gain"]) == statistics.mean(gains)
        assert float(row["gain_std"]) == statistics.stdev(gains)


def test_something_was_learnt(whole):
    """Else all of these tables would be equal for the wrong reason."""
    gains = [float(row["gain"]) for row in read(whole / "contributions.csv")]
    assert len(set(gains)) > 5
    assert max(map(abs, gains)) > 0.05
    assert max(float(row["val_top1"]) for row in read(whole / "trials.csv")) > 0.5


def test_trials_are_those_of_the_settings(whole, words):
    settings = TrialSettings("digits", None, weights=str(words[3]), resolution=32, base_depth=6, steps=10,
                                         learning_rate=1.0)  # fmt: skip
    scheme = UpdateScheme("mobilenet_v2-w0.35", 6, {EXPANDING[0]: 0.25})
    (row,) = (row for row in read(whole / "trials.csv") if (row["layer"], row["ratio"], row["seed"]) ==
              (EXPANDING[0], "0.25", "1"))  # fmt: skip
    assert trial_setup.fitness(settings, scheme.to_dict(), (1,)) == float(row["val_top1"])


def test_picture(whole):
    with Image.open(whole / "contributions.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


def test_folder_holds_nothing_else(whole):
    assert {path.name for path in whole.iterdir()} == {
        *("config.yaml", "trials.csv", "contributions.csv", "contributions.png", ".claims")
    }


def test_output_says_where_the_table_is_and_what_comes_next(finished, measure):
    output = measure(finished)
    assert made_here(output) == 0
    assert f"table: {finished / 'contributions.csv'}, picture: {finished / 'contributions.png'}\n" in output
    assert output.endswith("next: recipes/evolve_update_scheme.py --contributions with that table\n")


# ---- the same, whichever way it was made


@pytest.mark.parametrize(
    "changes",
    [
        ("--features", "none", "--side_by_side", 1),
        ("--features", "none", "--side_by_side", 8),
        ("--features", "disk", "--side_by_side", 1),
    ],
)
def test_table_does_not_depend_on_how_the_work_is_done(changes, whole, measure, tmp_path):
    assert made_here(measure(tmp_path / "out", *changes)) == TRIALS
    assert table_of(tmp_path / "out") == table_of(whole)
    assert (tmp_path / "out/features").exists() == ("disk" in changes)


def test_data_is_set_up_once(measure_quickly, built_anew, monkeypatch):
    """Decoding thousands of clips takes long."""
    made, original = [], trial_setup.data_module
    monkeypatch.setattr(trial_setup, "data_module", lambda *arguments: made.append(1) or original(*arguments))
    measure_quickly("--layers", "", "--bias_depths", "1")
    assert len(made) == 1


def test_saved_configuration_reproduces_it(built_anew, whole, finished, command, tmp_path):
    ended = command(RECIPE, "--config", finished / "config.yaml", "--out_dir", tmp_path / "again")
    assert ended.status == 0, ended.errors
    assert table_of(tmp_path / "again") == table_of(whole)


def test_command_line_goes_on_with_what_python_began(command, tmp_path):
    """A call from Python need not name what has a default."""
    main("", bias_depths="1", seeds=1, logger="none", out_dir=tmp_path / "out",
         settings=TrialSettings("digits", resolution=32, base_depth=1, steps=1))  # fmt: skip
    ended = command(
        *(RECIPE, "--layers", "", "--bias_depths", "1", "--seeds", 1, "--logger", "none", "--data", "digits"),
        *("--resolution", 32, "--base_depth", 1, "--steps", 1, "--out_dir", tmp_path / "out"),
    )
    assert ended.status == 0, ended.errors


def test_configuration_holds_all_arguments(killed, weights):
    config = yaml.safe_load((killed / "config.yaml").read_text())
    expected = {"data": "digits", "weights": str(weights), "steps": 10, "seeds": 2, "base_depth": 6, "copies": 4}
    assert {name: config[name] for name in expected} == expected
    assert config["ratios"] == "0.25,1"
    assert set(config) == set(TrialSettings.__dataclass_fields__) | {
        *("layers", "ratios", "bias_depths", "seeds", "side_by_side", "logger", "out_dir")
    }


def test_killed_and_begun_again(killed, whole, measure, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    known = len(read(killed / "trials.csv"))
    assert 4 < known < TRIALS
    assert made_here(measure(tmp_path / "out")) == TRIALS - known
    assert table_of(tmp_path / "out") == table_of(whole)
    # but for what a process that was killed while it wrote cannot remove
    hidden, before = ({path.name for path in folder.glob(".*")} for folder in (tmp_path / "out", killed))
    assert hidden <= before | {".claims"}


def test_killed_and_begun_again_with_another_number_side_by_side(killed, whole, measure, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    measure(tmp_path / "out", "--side_by_side", 3, "--features", "none")
    assert table_of(tmp_path / "out") == table_of(whole)
    assert len(read(tmp_path / "out/trials.csv")) == TRIALS


def test_stopped_after_any_trial(whole, finished, measure):
    """The trials are written first, so the table may lack the last of them."""
    lines = (finished / "trials.csv").read_text().splitlines(keepends=True)
    (finished / "trials.csv").write_text("".join(lines[:4]))
    (finished / "contributions.csv").unlink()
    measure(finished)
    assert table_of(finished) == table_of(whole)


@pytest.mark.parametrize("rows", [None, 5])
def test_stopped_between_the_last_trial_and_the_table(rows, whole, finished, measure):
    """Killed after trials.csv was written and before contributions.csv was."""
    lines = (finished / "contributions.csv").read_text().splitlines(keepends=True)
    (finished / "contributions.csv").unlink()
    if rows:
        (finished / "contributions.csv").write_text("".join(lines[: rows + 1]))
    assert made_here(measure(finished)) == 0
    assert table_of(finished) == table_of(whole)


def test_two_processes_share_the_work(children, whole, measure):
    """The last group is kept from both for a while, so that both are at it to the end."""
    child, out_dir = children["shared"], children["shared"].out_dir
    last = FileLock(claim_on(out_dir, -1), thread_local=False)
    last.acquire()
    timer = threading.Timer(1.5, last.release)
    timer.start()
    child.go_on_until(lambda: (out_dir / "config.yaml").exists())
    child.claim.release()
    made = made_here(measure(out_dir))
    child.go_on_until(lambda: "next: " in child.read("output"))
    timer.join()
    assert made + made_here(child.read("output")) == TRIALS
    assert len(read(out_dir / "trials.csv")) == TRIALS
    assert table_of(out_dir) == table_of(whole)


def test_what_another_process_is_at_is_left_to_it(whole, finished, measure, monkeypatch):
    """It makes the rest first, then waits; if the other one dies, what it was at is made too."""
    lines = (finished / "trials.csv").read_text().splitlines(keepends=True)
    (finished / "trials.csv").write_text("".join(lines[:5]))
    other = FileLock(claim_on(finished, 2))
    other.acquire()
    waited = []

    def sleep(seconds):
        waited.append(len(read(finished / "trials.csv")))
        other.release()  # it died

    monkeypatch.setattr("microtune.recipes.search.contribution_trials.time.sleep", sleep)
    assert made_here(measure(finished)) == TRIALS - 4
    assert waited == [TRIALS - 2 * 2]  # of two seeds, the two updates of the last group
    assert table_of(finished) == table_of(whole)


def test_a_process_does_not_wait_for_another_where_the_references_are_known(whole, finished, measure, monkeypatch):
    """The first group that is missing is being trained by another process; there is more to do than that."""
    lines = (finished / "trials.csv").read_text().splitlines(keepends=True)
    (finished / "trials.csv").write_text("".join(lines[:5]))
    other = FileLock(claim_on(finished, 1))
    other.acquire()
    original, blocking = FileLock.acquire, []

    def acquire(lock, timeout=None, **options):
        if lock.lock_file == other.lock_file and timeout == -1:
            blocking.append(lock.lock_file)
            other.release()
        return original(lock, timeout, **options)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    monkeypatch.setattr("microtune.recipes.search.contribution_trials.time.sleep", lambda _: other.release())
    measure(finished)
    assert table_of(finished) == table_of(whole)
    assert blocking == []


# ---- what is measured


@pytest.mark.parametrize(
    ("changes", "layers", "ratios", "depths"),
    [
        (("--layers", "all", "--ratios", "1", "--bias_depths", "6"), ALL, {1.0}, {0, 6}),
        (("--layers", f"{ALL[5]}, {ALL[0]}", "--ratios", "1,0.5", "--bias_depths", "0,2"), (ALL[0], ALL[5]),
         {0.5, 1.0}, {0, 2, 6}),
        (("--layers", "expanding", "--ratios", "0.5,0.5", "--bias_depths", "2,2,3"), EXPANDING, {0.5}, {0, 2, 3, 6}),
        (("--layers", "", "--bias_depths", "1"), (), set(), {0, 1, 6}),
    ],
)  # fmt: skip
def test_layers_ratios_and_depths(changes, layers, ratios, depths, measure_quickly):
    table = measure_quickly(*changes)
    assert tuple(table.weight_gains) == layers
    assert {ratio for gains in table.weight_gains.values() for ratio in gains} == ratios
    assert set(table.bias_gains) == depths


@pytest.fixture
def measure_quickly(command, words, tmp_path):
    """One seed and two steps; returns the table."""

    def call(*changes):
        ended = command(RECIPE, *words, "--out_dir", tmp_path / "out", "--seeds", 1, "--steps", 2, *changes)
        assert ended.status == 0, ended.errors
        return ContributionTable.load(tmp_path / "out/contributions.csv")

    return call


def test_what_is_measured_by_default(command, weights, tmp_path):
    ended = command(
        *(RECIPE, "--data", "digits", "--weights", weights, "--resolution", 32, "--base_depth", 6, "--steps", 1),
        *("--seeds", 2, "--logger", "none", "--out_dir", tmp_path / "out"),
    )
    assert ended.status == 0, ended.errors
    assert ended.output.startswith("14 contributions from 30 trials, 30 of them made here, in ")
    table = ContributionTable.load(tmp_path / "out/contributions.csv")
    assert {layer: tuple(gains) for layer, gains in table.weight_gains.items()} == dict.fromkeys(
        EXPANDING, (0.125, 0.25, 0.5, 1.0)
    )
    assert set(table.bias_gains) == set(range(7))


def test_one_seed_has_no_deviation(measure_quickly):
    table = measure_quickly("--layers", "", "--bias_depths", "1")
    assert {(row.gain_std, row.runs) for row in table.rows} == {(0.0, 1)}


def test_without_data_dir_or_out_dir(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    short = ("--resolution", 32, "--base_depth", 1, "--steps", 1, "--seeds", 1, "--layers", "", "--logger", "none")
    ended = command(RECIPE, "--data", "digits", *short)
    assert ended.status == 0, ended.errors
    assert len(list(tmp_path.glob("runs/measure_contributions/*/contributions.csv"))) == 1


def test_speech(command, tiny_speech_commands, tmp_path):
    ended = command(
        *(RECIPE, "--data", "speech_commands", "--data_dir", tiny_speech_commands, "--batch_size", 20),
        *("--data_options", json.dumps({"task": "words10"}), "--base_depth", 3, "--steps", 3, "--seeds", 1),
        *("--ratios", "1", "--logger", "none", "--out_dir", tmp_path / "out"),
    )
    assert ended.status == 0, ended.errors
    assert len(read(tmp_path / "out/contributions.csv")) == 4


# ---- Weights & Biases


def test_offline_run_holds_table_and_picture(finished, measure, monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    measure(finished, "--logger", "wandb")
    wandb.teardown()
    (run,) = finished.glob("wandb/offline-run-*")
    (file,) = run.glob("files/media/table/contributions*.table.json")
    logged = json.loads(file.read_text())
    table = ContributionTable.load(finished / "contributions.csv")
    assert logged["columns"] == ["kind", "bias_depth", "layer", "ratio", "gain", "gain_std", "runs"]
    assert logged["data"] == [list(vars(row).values())[:7] for row in table.rows]
    (picture,) = run.glob("files/media/images/gains*.png")
    assert picture.read_bytes() == (finished / "contributions.png").read_bytes()
    assert list(run.glob("run-*.wandb"))


# ---- wrong input


# one of each kind; all that a plan refuses is in search/test_plan.py
MISTAKES = {
    "a list that is none": (("--bias_depths", "deep"), "'deep' is no list of numbers: separate them by commas"),
    "unknown layer": (("--layers", "features.99"), "features.99 is no convolution within base depth 6: the first is "
                      "features.16.conv.0.0"),
    "layer before the base depth": (("--layers", f"{ALL[0]},features.15.conv.2"),
                                    "features.15.conv.2 is no convolution within base depth 6: the first is features"),
    "ratio 0": (("--ratios", "0,1"), rf"update ratio of {EXPANDING[0]} is 0\.0: give a number in \(0, 1\]"),
    "ratio above 1": (("--ratios", "1.5"), rf"update ratio of {EXPANDING[0]} is 1\.5: give a number in \(0, 1\]"),
    "ratio of no channel": (("--ratios", "0.01"), "update ratio 0.01 of .* is none of its 56 input"),
    "base depth 99": (("--base_depth", 99), "base_depth is 99: give 1 to 51, the network's convolutions"),
    "unknown data": (("--data", "mnist"), "data is .*mnist.*: give one of .*digits"),
    "unknown data option": (("--data_options", '{"colour": 1}'), "digits has no option 'colour': give one of "),
    "missing data_dir": (("--data", "cifar10"), "cifar10 lies in a folder: give it with --data_dir"),
    "limit": (("--features_limit_mib", 0.01), r"\d MiB, more than the limit of 0\.01 MiB: raise --features_limit"),
    "no steps": (("--steps", 0), "steps is 0: give 1 or more"),
    "steps in words": (("--steps", "many"), "steps is many: give a whole number"),
    "width 0": (("--width", 0), "width .*0"),
    "missing weights": (("--weights", "nowhere.ckpt"), "nowhere.ckpt does not exist"),
    "weights of another width": (("--width", 0.5), "give|build"),
    "unknown option": (("--epochs", 3), "epochs"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_input(mistake, command, words, monkeypatch, tmp_path):
    """One clear line and exit status 2, and nothing is written."""
    changes, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    ended = command(RECIPE, *words, *changes, "--out_dir", "out")
    assert (ended.status, ended.output) == (2, ""), ended.errors
    assert ended.errors.startswith(f"{RECIPE}.py: error: ")
    assert ended.errors.count("\n") == 1
    assert re.search(message, ended.errors), ended.errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--seeds", 3), "was begun with seeds 2, not 3"),
        (("--data_options", '{"classes": [0, 1]}'), r"was begun with data_options \{\}, not \{'classes': \[0, 1\]\}"),
    ],
)
def test_another_measurement_in_the_folder_is_refused(changes, message, killed, command, words, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    out_dir = tmp_path / "out"
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}
    ended = command(RECIPE, *words, *changes, "--out_dir", out_dir)
    assert (ended.status, ended.output) == (2, "")
    assert re.search(message, ended.errors), ended.errors
    assert ended.errors.startswith(f"{RECIPE}.py: error: the work in {out_dir} was begun with ")
    assert ended.errors.endswith(
        f": go on with --config {out_dir / 'config.yaml'} --out_dir {out_dir}, or give another --out_dir\n"
    )
    assert {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_refused(command, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert ended.status == 2
    assert ended.errors == (
        f"{RECIPE}.py: error: {tmp_path / 'out'} holds thesis.txt, but no config.yaml of this recipe: "
        "give another --out_dir\n"
    )
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(command, words, tmp_path):
    (tmp_path / "out").write_text("mine")
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert ended.status == 2
    assert f"{tmp_path / 'out'} cannot be a run's folder: " in ended.errors
    assert ended.errors.endswith(": give another --out_dir\n")


@pytest.mark.parametrize("content", ["data: [", "seeds"])
def test_a_damaged_configuration_is_refused(content, finished, command, words):
    (finished / "config.yaml").write_text(content)
    ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 2
    assert ended.errors.count("\n") == 1
    assert str(finished) in ended.errors


def test_damaged_trials_are_refused(finished, command, words):
    with (finished / "trials.csv").open("a") as file:
        file.write("bias,3,,0.0,0,much\n")
    ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 2
    assert ended.errors.count("\n") == 1
    assert str(finished / "trials.csv") in ended.errors
