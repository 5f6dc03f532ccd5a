"""The comparison of schemes by real training: equal terms, paired differences, resumed to the bit, clear errors."""

import csv
import json
import math
import pickle
import re
import shutil

import pytest
import torch
import wandb
import yaml
from filelock import FileLock
from PIL import Image
from torch import nn

from microtune.datamodules.cifar import CIFAR
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes import train_cifar
from microtune.recipes.search.budget import budget_of
from microtune.recipes.studies import compare_schemes, paired_trainings
from microtune.recipes.studies.compare_schemes import Judge, named_files, random_schemes, ruled
from microtune.recipes.training.memory_figures import scheme_fits
from microtune.recipes.training.networks import describe_network

RECIPE = "compare_schemes"
NAMES = ("evolved", "last_layers", "biases", "random")
COLUMNS = ["scheme", "seed", "top1", "val_top1", "memory_bytes", "bias_depth", "updated_layers", "seconds"]
EVOLVED = UpdateScheme(
    "mobilenet_v2-w0.35", 12, {"features.16.conv.0.0": 0.5, "features.14.conv.0.0": 1.0}, provenance={"by": "hand"}
)
BUDGET_KIB = 100
STUDENT_T_OF_2 = 12.7062  # of two seeds at 95 %, from a printed table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def weights(tiny_cifar, tmp_path_factory):
    """A folded network that knows brightness a little, of other classes: the classifier begins anew with each seed."""
    data = CIFAR(tiny_cifar, resolution=32, batch_size=16)
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = mobilenet_v2(0.35, num_classes=10)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for batch in [*data.train_dataloader()] * 4:
        images, labels = data.on_after_batch_transfer(batch, 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
    folded = fold_batch_norm(network.eval(), data.input_shape)
    path = tmp_path_factory.mktemp("weights") / "bright.ckpt"
    described = {"width": 0.35, "num_classes": 10, "in_channels": 3, "folded": True, "padding": "symmetric"}
    torch.save(
        {
            "state_dict": {f"net.{name}": value for name, value in folded.state_dict().items()},
            "hyper_parameters": {"network": described, "class_names": list("abcdefghij"), "input_shape": [3, 32, 32]},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def evolved_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("evolved") / "scheme.json"
    EVOLVED.save(path)
    return path


@pytest.fixture(scope="module")
def arguments(tiny_cifar, weights, evolved_file):
    """Of a comparison of some seconds."""
    return {
        "schemes": f"evolved={evolved_file}", "rules": ",".join(NAMES[1:]), "data": "cifar10",
        "data_dir": str(tiny_cifar), "weights": str(weights),
        "resolution": 32, "memory": "extra", "budget_kib": float(BUDGET_KIB), "epochs": 1, "batch_size": 16,
        "learning_rate": 0.1, "seeds": 2, "logger": "none",
    }  # fmt: skip


@pytest.fixture(scope="module")
def words(arguments):
    """The same as words of the command line."""
    return [word for name, value in arguments.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The folder of a comparison that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    compare_schemes.main(**arguments, out_dir=out_dir)
    return out_dir


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "finished")
    return tmp_path / "finished"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values_of(folder):
    """The rows of ``results.csv`` without the seconds that they took."""
    return [{**row, "seconds": None} for row in read(folder / "results.csv")]


def judge_of(memory="extra", budget_kib=None, mcu=None, resolution=32):
    described = describe_network("none", (3, resolution, resolution), 10)
    return Judge(described, budget_of(memory, budget_kib, mcu, None, None, None))


# ---- what it writes


def test_rows_are_complete(whole):
    rows = read(whole / "results.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["scheme"], row["seed"]) for row in rows] == [(name, seed) for seed in "01" for name in NAMES]
    described = judge_of(budget_kib=BUDGET_KIB).described
    for row in rows:
        run = whole / f"runs/{row['scheme']}-seed{row['seed']}"
        report, scheme = json.loads((run / "report.json").read_text()), UpdateScheme.load(run / "scheme.json")
        assert (float(row["top1"]), float(row["val_top1"])) == (report["top1"], report["val_top1"])
        assert float(row["memory_bytes"]) == report["extra_memory_bytes"] <= BUDGET_KIB * 1024
        assert float(row["seconds"]) == pytest.approx(report["seconds"], abs=0.06)
        assert (int(row["bias_depth"]), int(row["updated_layers"])) == (scheme.bias_depth, len(scheme.weights))
        scheme.check(described.operations.convolutions, described.name)
    assert UpdateScheme.load(whole / "runs/evolved-seed1/scheme.json") == EVOLVED


def test_something_was_learnt(whole):
    """Else all of these values would be equal for the wrong reason."""
    values = [float(row["top1"]) for row in read(whole / "results.csv")]
    assert len(set(values)) > 2
    assert max(values) > 0.2


def test_folder(whole):
    assert {path.name for path in whole.iterdir()} - {".claims"} == {
        *("config.yaml", "results.csv", "report.json", "comparison.png", "schemes", "runs")
    }
    assert {path.name for path in (whole / "schemes").iterdir()} == {
        *("evolved.json", "last_layers.json", "biases.json", "random-seed0.json", "random-seed1.json")
    }
    with Image.open(whole / "comparison.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


def test_configuration_holds_all_arguments(whole, arguments):
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert {name: config[name] for name in arguments} == arguments


def test_differences_are_paired(whole):
    """By hand: of the trainings with the same seed, and Student's interval of two."""
    top1 = {(row["scheme"], row["seed"]): float(row["top1"]) for row in read(whole / "results.csv")}
    entries = json.loads((whole / "report.json").read_text())["schemes"]
    assert [entry["scheme"] for entry in entries] == list(NAMES)
    assert "difference" not in entries[0]
    for entry in entries:
        own = [top1[entry["scheme"], seed] for seed in "01"]
        assert entry["top1"] == {"0": own[0], "1": own[1]}
        assert entry["top1_mean"] == pytest.approx(sum(own) / 2)
        assert entry["top1_std"] == pytest.approx(abs(own[0] - own[1]) / math.sqrt(2))
    for entry in entries[1:]:
        first, second = (top1["evolved", seed] - top1[entry["scheme"], seed] for seed in "01")
        mean, half = (first + second) / 2, STUDENT_T_OF_2 * abs(first - second) / 2
        assert entry["difference"] == pytest.approx(mean)
        assert entry["interval"] == pytest.approx([mean - half, mean + half], rel=1e-4)


def test_output(finished, command, words):
    """A table, where the results lie, and nothing of what the trainings print; nothing is trained again."""
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/report.json")}
    ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 0, ended.errors
    assert {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/report.json")} == before
    report = json.loads((finished / "report.json").read_text())
    lines = [re.split(r"\s*│\s*", line)[1:-1] for line in ended.output.splitlines() if line.startswith("│")]
    assert [line[0] for line in lines] == list(NAMES)
    for line, entry in zip(lines, report["schemes"], strict=True):
        assert line[1] == f"{entry['memory_bytes_mean'] / 1024:.1f}"
        assert line[2] == f"{entry['top1_mean'] * 100:.2f} ± {entry['top1_std'] * 100:.2f}"
        assert line[5] == "2"
    assert lines[1][3] == f"{report['schemes'][1]['difference'] * 100:+.2f}"
    low, high = report["schemes"][1]["interval"]
    assert lines[1][4] == f"{low * 100:+.2f} to {high * 100:+.2f}"
    last = ended.output.splitlines()[-1]
    assert re.fullmatch(rf"results: {finished}/results.csv, report: {finished}/report.json, \d+ s", last)
    assert "missing" not in ended.output


def test_training_is_that_of_the_training_recipe(whole, arguments, tmp_path):
    report = train_cifar.main(
        data_dir=arguments["data_dir"], weights=arguments["weights"], resolution=32, epochs=1, batch_size=16, seed=1,
        scheme=str(whole / "schemes/random-seed1.json"), learning_rate=0.1, logger="none", out_dir=tmp_path / "run",
    )  # fmt: skip
    (row,) = (row for row in read(whole / "results.csv") if (row["scheme"], row["seed"]) == ("random", "1"))
    assert (report["top1"], report["val_top1"]) == (float(row["top1"]), float(row["val_top1"]))


# ---- the same, whether stopped or not


def test_stopped_and_begun_again(whole, finished, command, words, interrupt):
    """Two trainings had not begun, one was killed in its first steps, one before its report was written."""
    shutil.rmtree(finished / "runs/random-seed1")
    shutil.rmtree(finished / "runs/biases-seed1")
    (finished / "runs/biases-seed1").mkdir()
    (finished / "runs/last_layers-seed0/report.json").unlink()
    for name in ("results.csv", "report.json", "comparison.png"):
        (finished / name).unlink()
    known = {path: path.read_bytes() for path in finished.glob("runs/*/report.json")}
    interrupt(epoch=0)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        command(RECIPE, *words, "--out_dir", finished)
    begun = [path.name for path in (finished / "runs").iterdir() if not (path / "report.json").exists()]
    assert begun == ["biases-seed1"]  # random-seed1 is after it
    assert not (finished / "report.json").exists()
    ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 0, ended.errors
    assert values_of(finished) == values_of(whole)
    assert {path: path.read_bytes() for path in known} == known
    first, again = (json.loads((folder / "report.json").read_text()) for folder in (whole, finished))
    for entry in (*first["schemes"], *again["schemes"]):
        del entry["seconds_mean"]
    assert first["schemes"] == again["schemes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--seeds", 3), "was begun with seeds 2, not 3"),
        (("--epochs", 2), "was begun with epochs 1, not 2"),
        (("--learning_rate", 0.2), r"was begun with learning_rate 0\.1, not 0\.2"),
        (("--budget_kib", 120), r"was begun with budget_kib 100\.0, not 120\.0"),
        (("--rules", "biases"), "was begun with rules last_layers,biases,random, not biases"),
    ],
)
def test_another_comparison_in_the_folder_is_refused(changes, message, finished, command, words):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    ended = command(RECIPE, *words, *changes, "--out_dir", finished)
    assert (ended.status, ended.output) == (2, "")
    assert re.search(f"the work in {finished} {message}: go on with --config ", ended.errors), ended.errors
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_another_scheme_under_the_same_name_is_refused(finished, command, words, evolved_file):
    evolved_file.write_text(json.dumps({**EVOLVED.to_dict(), "bias_depth": 13}))
    try:
        ended = command(RECIPE, *words, "--out_dir", finished)
    finally:
        EVOLVED.save(evolved_file)
    assert ended.status == 2
    kept = finished / "schemes/evolved.json"
    assert f"was begun with another scheme evolved, {kept}: give that one, or another --out_dir" in ended.errors
    assert UpdateScheme.load(kept) == EVOLVED


def test_what_may_change(finished, whole, command, words, tiny_cifar, tmp_path):
    shutil.copytree(tiny_cifar, tmp_path / "moved")
    ended = command(
        RECIPE, *words, "--data_dir", tmp_path / "moved", "--processes", 2, "--logger", "csv", "--out_dir", finished
    )
    assert ended.status == 0, ended.errors
    assert values_of(finished) == values_of(whole)


def test_folder_of_something_else_is_refused(command, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert ended.status == 2
    assert f"{tmp_path}/out holds thesis.txt, but no config.yaml of this recipe: give another --out_dir" in ended.errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out/thesis.txt")
    assert ended.status == 2
    assert "thesis.txt cannot be a run's folder: " in ended.errors


def test_folder_of_another_process_is_refused(finished, command, words):
    with FileLock(finished / ".claims" / "comparison.lock"):
        ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 2
    assert f"another process is at the comparison in {finished}: wait for it" in ended.errors


# ---- on equal terms


def test_terms_are_equal(arguments, pretended, tmp_path):
    """Trainings differ in the scheme and the seed alone; with batch 1 in the batch and the learning rate too."""
    compare_schemes.main(**arguments, batch_1=True, data_options={"validation_fraction": 0.2}, out_dir=tmp_path / "out")
    assert [call["out_dir"].name for call in pretended.all] == [
        f"{name}-seed{seed}" for seed in (0, 1) for name in ("evolved", "evolved,batch1", *NAMES[1:])
    ]
    for call in pretended.all:
        name, seed = call["out_dir"].name.rsplit("-seed")
        file = f"random-seed{seed}.json" if name == "random" else f"{name.partition(',')[0]}.json"
        assert (call["scheme"], call["seed"]) == (str(tmp_path / "out/schemes" / file), int(seed))
        data = call["data"]
        assert (data.seed, data.batch_size, data.input_shape) == (int(seed), call["batch_size"], (3, 32, 32))
        assert data.val_samples == 20
        alone = name.endswith("batch1")
        assert (call["batch_size"], call["learning_rate"]) == ((1, 0.1 / 16) if alone else (16, 0.1))
    same = [
        {name: value for name, value in call.items()
         if name not in ("out_dir", "scheme", "seed", "data", "batch_size", "learning_rate")}
        for call in pretended.all
    ]  # fmt: skip
    assert same == [same[0]] * len(same)
    assert (same[0]["epochs"], same[0]["weights"]) == (1, arguments["weights"])
    assert same[0]["network"] == "mobilenet_v2"
    names = [row["scheme"] for row in read(tmp_path / "out/results.csv")]
    assert names[:5] == ["evolved", "evolved, batch 1", *NAMES[1:]]


def test_default_learning_rate(arguments, pretended, tmp_path):
    compare_schemes.main(**{**arguments, "learning_rate": None, "rules": "biases"}, out_dir=tmp_path / "out")
    assert {call["learning_rate"] for call in pretended.all} == {0.1 / 256 * 16}


def test_rules_alone_and_width(arguments, pretended, tmp_path):
    changes = {"schemes": "", "rules": "biases,last_layers", "weights": "none", "width": 0.5, "seeds": 1}
    report = compare_schemes.main(**arguments | changes, out_dir=tmp_path / "out")
    assert [entry["scheme"] for entry in report["schemes"]] == ["biases", "last_layers"]
    assert {call["width"] for call in pretended.all} == {0.5}
    assert UpdateScheme.load(tmp_path / "out/schemes/biases.json").network == "mobilenet_v2-w0.5"
    assert report["schemes"][0]["top1_std"] is None
    assert (report["schemes"][1]["difference"], report["schemes"][1]["interval"]) == (0, None)


# ---- what fits


def deeper(scheme, judge, rule):
    """The next larger scheme of the rule, made by hand; None if it already has all."""
    convolutions = judge.described.operations.convolutions
    wanted = {
        "last_layers": convolutions,
        "expanding": [layer for layer in convolutions if is_expanding(layer)],
        "biases": [],
    }[rule]
    depth = scheme.bias_depth + 1
    if rule == "expanding":
        count = len(scheme.weights) + 1
        if count > len(wanted):
            return None
        depth = len(convolutions) - convolutions.index(wanted[-count])
    if depth > len(convolutions):
        return None
    weights = {layer.name: 1.0 for layer in wanted if layer in convolutions[-depth:]}
    return UpdateScheme(scheme.network, depth, weights)


BUDGETS = [
    {"memory": "extra", "budget_kib": 8}, {"memory": "extra", "budget_kib": 64}, {"memory": "peak", "budget_kib": 40},
    {"memory": "peak", "budget_kib": 200}, {"memory": "peak", "mcu": "stm32f746", "resolution": 96},
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS)
def test_rules_fill_the_budget(budget):
    judge = judge_of(**budget)
    for rule in ("last_layers", "biases", "expanding"):
        scheme = ruled(rule, judge)
        assert within(scheme, judge)
        assert set(scheme.weights.values()) <= {1.0}
        assert bool(scheme.weights) <= (rule != "biases")
        larger = deeper(scheme, judge, rule)
        assert larger is None or not within(larger, judge)
        if scheme.bias_depth:
            smaller = (
                {name: ratio for name, ratio in larger.weights.items() if name in scheme.weights} if larger else {}
            )
            assert not larger or smaller == dict(scheme.weights)


@pytest.mark.parametrize("budget", BUDGETS[:3])
def test_random_schemes_fit_and_differ(budget):
    judge = judge_of(**budget)
    schemes = random_schemes(judge, None, seeds=4)
    assert all(within(scheme, judge) for scheme in schemes)
    assert len({(scheme.bias_depth, *scheme.weights.items()) for scheme in schemes}) > 1
    expanding = {layer.name for layer in judge.described.operations.convolutions if is_expanding(layer)}
    for scheme in schemes:
        assert scheme.weights.keys() <= expanding
        assert set(scheme.weights.values()) <= {0.125, 0.25, 0.5, 1.0}
        scheme.check(judge.described.operations.convolutions, judge.described.name)


def within(scheme, judge):
    operations = judge.described.operations
    if judge.budget.microcontroller is not None:
        return scheme_fits(judge.peak_memory, scheme, judge.budget.microcontroller)
    if judge.budget.memory == "peak":
        return judge.peak_memory.peak_bytes(scheme) <= judge.budget.size_bytes
    return (
        extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme) <= judge.budget.size_bytes
    )


def test_random_schemes_of_a_table(tmp_path):
    nothing = {"gain_std": 0.0, "runs": 1}
    rows = [Contribution("bias", depth, "", 0.0, gain=0.1, **nothing) for depth in (6, 12)]
    rows += [Contribution("weight", 12, "features.16.conv.0.0", ratio, gain=0.2, **nothing) for ratio in (0.5, 0.75)]
    ContributionTable(tuple(rows)).save(tmp_path / "table.csv")
    schemes = random_schemes(judge_of(budget_kib=500), tmp_path / "table.csv", seeds=30)
    assert random_schemes(judge_of(budget_kib=500), tmp_path / "table.csv", seeds=3) == schemes[:3]
    assert {scheme.bias_depth for scheme in schemes} == {0, 6, 12}
    assert {tuple(scheme.weights.items()) for scheme in schemes} == {
        *((), (("features.16.conv.0.0", 0.5),), (("features.16.conv.0.0", 0.75),))
    }


# ---- trainings that come to no end


def test_lost_and_failed_trainings_are_missing(arguments, pretended, command, words, caplog, monkeypatch, tmp_path):
    """A worker that died gives None; a training that diverged says so; the others are compared."""

    class Workers:
        def __init__(self, processes):
            self.processes = processes

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, function, *iterables):
            results = []
            for call in zip(*iterables, strict=True):
                task, training = pickle.dumps((function, call)), call[0]
                assert self.processes == 2
                if (training.scheme, training.seed) == ("evolved", 0):
                    results.append(None)
                else:
                    function, call = pickle.loads(task)
                    results.append(function(*call))
            return results

    def diverges(folder):
        if folder.startswith("biases"):
            raise UserError("training diverged at learning rate 0.1: start anew")
        return 0.5 if "seed1" in folder else 0.75

    pretended.of = diverges
    monkeypatch.setattr(paired_trainings, "Workers", Workers)
    ended = command(RECIPE, *words, "--processes", 2, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["missing"] == ["evolved, seed 0", "biases, seed 0", "biases, seed 1"]
    for name in report["missing"]:
        assert f"missing: {name}; the same command tries again\n" in ended.output
    assert "biases, seed 1: training diverged at learning rate 0.1: start anew" in caplog.messages
    evolved, last_layers, biases, _ = report["schemes"]
    assert (evolved["top1"], last_layers["top1"], biases["top1"]) == ({"1": 0.5}, {"0": 0.75, "1": 0.5}, {})
    assert (last_layers["difference"], last_layers["interval"]) == (0, None)  # of the seed that both have
    assert "difference" not in biases
    assert re.search(r"│ biases +│ +│ +missing │", ended.output)
    assert len(read(tmp_path / "out/results.csv")) == 5


def test_where_nothing_comes_out_that_is_an_error(pretended, command, words, tmp_path):
    def diverges(folder):
        raise UserError("training diverged: start anew")

    pretended.of = diverges
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.endswith(f"{RECIPE}.py: error: random, seed 1: training diverged: start anew\n")


# ---- Weights & Biases


def test_offline_run_holds_results_and_picture(finished, command, words, monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    ended = command(RECIPE, *words, "--logger", "wandb", "--out_dir", finished)
    assert ended.status == 0, ended.errors
    wandb.teardown()
    (run,) = finished.glob("wandb/offline-run-*")
    (file,) = run.glob("files/media/table/results*.table.json")
    logged = json.loads(file.read_text())
    assert logged["columns"] == COLUMNS
    assert [[str(value) for value in row] for row in logged["data"]] == [
        list(row.values()) for row in read(finished / "results.csv")
    ]
    (picture,) = run.glob("files/media/images/comparison*.png")
    assert picture.read_bytes() == (finished / "comparison.png").read_bytes()


# ---- wrong input


MISTAKES = {
    "unknown rule": (("--rules", "biases,best"), "rule 'best' is unknown: give some of last_layers, biases, exp"),
    "no pair": (("--schemes", "scheme.json"), "'scheme.json' is no name=file pair: give such as evolved=scheme.json"),
    "no name": (("--schemes", "=scheme.json"), "'=scheme.json' is no name=file pair: give such as evolved=scheme.json"),
    "no file": (("--schemes", "evolved="), "'evolved=' is no name=file pair: give such as evolved=scheme.json"),
    "name with a slash": (("--schemes", "../a=b.json"), r"'\.\./a=b\.json' is no name=file pair"),
    "same name": (("--schemes", "a=b.json,a=c.json"), "two schemes have the name a: give each its own"),
    "name of a rule": (("--schemes", "biases=b.json"), "two schemes have the name biases: give each its own"),
    "same rule": (("--rules", "random,random"), "two schemes have the name random: give each its own"),
    "missing file": (("--schemes", "a=nowhere.json"), r"nowhere\.json: cannot read the update scheme: No such file"),
    "nothing": (("--schemes", "", "--rules", ""), "there is nothing to compare: give --schemes evolved=scheme.json"),
    "over the budget": (
        ("--budget_kib", 20),
        r"scheme evolved needs 26\.3 KiB of extra memory, but the budget is 20\.0 KiB; the smallest scheme, the "
        r"classifier only, needs 0\.1 KiB; most of the extra memory goes to features\.16\.conv\.0\.0 \(10\.6 KiB\), "
        r"features\.14\.conv\.0\.0 \(.* KiB\), .*: give another scheme or budget$",
    ),
    "budget below all": (("--budget_kib", 0.01, "--rules", "biases", "--schemes", ""), "scheme biases needs 0.1 KiB"),
    "random below all": (("--budget_kib", 0.01), "the smallest scheme, the classifier only, needs 0.1 KiB: give at"),
    "over an MCU's budget": (
        ("--memory", "peak", "--budget_kib", "null", "--sram_bytes", 60_000, "--reserve_bytes", 10_000),
        r"scheme evolved: one training step needs .* KiB at its peak .*: update fewer channels or layers; give another",
    ),
    "extra memory of an MCU": (("--budget_kib", "null", "--mcu", "rp2040"), "extra memory leaves out the forward pass"),
    "epochs 0": (("--epochs", 0), "epochs is 0: give 1 or more"),
    "seeds 0": (("--seeds", 0), "seeds is 0: give 1 or more"),
    "processes 0": (("--processes", 0), "processes is 0: give 1 or more"),
    "batch_size 0": (("--batch_size", 0), "batch_size is 0: give 1 or more"),
    "batch_1 twice": (("--batch_1", "true", "--batch_size", 1), "batch_size is 1 already: leave --batch_1 out"),
    "missing table": (("--contributions", "nowhere.csv"), r"nowhere\.csv: the file cannot be read: No such"),
    "scheme of another network": (("--width", 0.5), "the scheme is for mobilenet_v2-w0.35, but the network is mob"),
    "unknown data option": (("--data_options", '{"task": "words10"}'), "cifar10 has no option 'task': give one of"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_input(mistake, command, words, tmp_path, monkeypatch):
    """One clear line and exit status 2, and nothing is written."""
    changes, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    ended = command(RECIPE, *words, *changes, "--out_dir", "out")
    assert (ended.status, ended.output) == (2, ""), ended.errors
    line = ended.errors.splitlines()[-1]
    assert line.startswith(f"{RECIPE}.py: error: ")
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_pairs():
    assert named_files(" a=b.json, c-1=d/e=f.json ,") == {"a": "b.json", "c-1": "d/e=f.json"}
    assert named_files("") == {}


def test_schemes_may_have_learning_rates_of_their_own(tmp_path):
    files = {"evolved": [tmp_path / "a.json"], "biases": [tmp_path / "b.json"]}
    rates = {"evolved": 0.01, "biases": 0.01} | compare_schemes.own_rates("biases=0.05", list(files))
    trainings = compare_schemes.trainings_of(files, 20, rates, True, tmp_path, {}, {})
    assert [(one.scheme, one.learning_rate) for one in trainings] == [
        ("evolved", 0.01), ("evolved, batch 1", 0.01 / 20), ("biases", 0.05),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bias=0.05", "learning_rates names 'bias', which is not compared: give one of evolved, biases"),
        ("biases=fast", "learning_rates has 'biases=fast': give name=rate with a positive number, as in biases=0.05"),
        ("biases=0", "learning_rates has 'biases=0': give name=rate with a positive number"),
        ("biases", "learning_rates has 'biases': give name=rate with a positive number"),
    ],
)
def test_wrong_learning_rates(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compare_schemes.own_rates(text, ["evolved", "biases"])
