"""The study of ways to train: equal terms, paired differences, each training done once and kept, clear errors."""

import csv
import dataclasses
import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from filelock import FileLock
from PIL import Image
from torch import nn

from microtune.datamodules.cifar import CIFAR
from microtune.modules.csv_rows import read_rows
from microtune.modules.int8.files import write_quantized_network
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.search.short_training import TrialTraining
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes import train_cifar
from microtune.recipes.studies import compare_trainings, seeded_trainings
from microtune.recipes.studies.options import TermOptions
from microtune.recipes.studies.result_rows import METHODS, Result
from microtune.recipes.studies.seeded_trainings import Case
from microtune.recipes.studies.study import Study, trainings_of
from microtune.recipes.studies.transfer_tasks import TransferTask
from microtune.recipes.studies.ways import Way, load_ways
from microtune.recipes.training.command_line import called_with
from microtune.recipes.training.networks import describe_network

RECIPE = "compare_trainings"
NAMES = ("evolved", "last_layers", "biases", "random")
EVOLVED = UpdateScheme(
    "mobilenet_v2-w0.35", 12, {"features.16.conv.0.0": 0.5, "features.14.conv.0.0": 1.0}, provenance={"by": "hand"}
)
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
    """Of a study of some seconds."""
    return {
        "ways": f"evolved={evolved_file},last_layers,biases,random", "data": "cifar10", "data_dir": str(tiny_cifar),
        "weights": str(weights), "resolution": 32, "budgets": "extra100", "epochs": 2, "batch_size": 16,
        "learning_rate": 0.1, "seeds": 2, "logger": "none",
    }  # fmt: skip


@pytest.fixture(scope="module")
def words(arguments):
    """The same as words of the command line."""
    return [word for name, value in arguments.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The folder of a study that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    compared(**arguments, out_dir=out_dir)
    return out_dir


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "finished")
    return tmp_path / "finished"


@pytest.fixture
def trained(monkeypatch):
    """The trainings that are really done."""
    done, original = [], seeded_trainings.train_once
    monkeypatch.setattr(seeded_trainings, "train_once", lambda *of: (original(*of), done.append(of[0])))
    return done


@pytest.fixture
def pretended(monkeypatch):
    """Lets trainings only pretend, whatever their scheme: all of them."""
    done = []

    def train(training, path):
        done.append(training)
        top1 = dict.fromkeys(training.splits, 0.5 + training.seed / 100)
        Path(path).write_text(json.dumps({"top1": top1, "loss": 1.0, "seconds": 1.0}))

    monkeypatch.setattr(seeded_trainings, "train_once", train)
    return done


def rows_of(folder):
    """The rows of ``results.csv`` without the seconds that they took."""
    return [dataclasses.replace(row, train_seconds=0.0) for row in read_rows(folder / "results.csv", Result)]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def compared(**arguments):
    """What the study reports: its arguments flat, as the command line has them."""
    return called_with(compare_trainings.main, arguments)


# ---- what it writes


def test_rows_are_complete(whole):
    rows = rows_of(whole)
    assert [(row.way, row.seed) for row in rows] == [(name, seed) for name in NAMES for seed in (0, 1)]
    described = describe_network("none", (3, 32, 32), 10)
    for row in rows:
        name = f"random-seed{row.seed}" if row.way == "random" else row.way
        scheme = UpdateScheme.load(whole / f"schemes/cifar10-extra100-{name}.json")
        scheme.check(described.operations.convolutions, described.name)
        assert (row.bias_depth, row.updated_layers) == (scheme.bias_depth, len(scheme.weights))
        assert row.extra_memory_bytes <= 100 * 1024
        # two epochs of 90 images, of which each has six batches
        assert (row.steps, row.batch_size, row.learning_rate, row.numbers) == (12, 16, 0.1, "fp32")
    assert UpdateScheme.load(whole / "schemes/cifar10-extra100-evolved.json") == EVOLVED
    assert len({row.top1 for row in rows}) > 2  # else all of this would be equal for the wrong reason
    assert max(row.top1 for row in rows) > 0.2


def test_folder(whole, arguments):
    assert {path.name for path in whole.iterdir()} - {".claims"} == {
        *("config.yaml", "results.csv", "report.json", "comparison.png", "schemes", "trainings", "features"),
        *("ways.json", "data_sets.json", "networks.json"),
    }
    with Image.open(whole / "comparison.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert {name: config[name] for name in arguments} == arguments


def test_differences_are_paired(whole):
    """By hand: of the trainings with the same seed, and Student's interval of two."""
    top1 = {(row.way, row.seed): row.top1 for row in rows_of(whole)}
    (comparison,) = report_of(whole)["comparisons"]
    assert (comparison["data"], comparison["budget"], comparison["memory"]) == ("cifar10", "extra100", "extra")
    assert [entry["way"] for entry in comparison["ways"]] == list(NAMES)
    for entry in comparison["ways"][1:]:
        first, second = (top1["evolved", seed] - top1[entry["way"], seed] for seed in (0, 1))
        mean, half = (first + second) / 2, STUDENT_T_OF_2 * abs(first - second) / 2
        assert entry["difference"] == pytest.approx(mean)
        assert entry["interval"] == pytest.approx([mean - half, mean + half], rel=1e-4)
        own = [top1[entry["way"], seed] for seed in (0, 1)]
        assert entry["top1_std"] == pytest.approx(abs(own[0] - own[1]) / math.sqrt(2))


def test_output(finished, command, words, trained):
    """A table, and where the results lie; nothing is trained again."""
    ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 0, ended.errors
    assert not trained
    lines = [re.split(r"\s*│\s*", line)[1:-1] for line in ended.output.splitlines() if line.startswith("│")]
    assert [line[0] for line in lines] == list(NAMES)
    last = ended.output.splitlines()[-1]
    assert re.fullmatch(rf"results: {finished}/results.csv, report: {finished}/report.json, \d+ s", last)
    assert "missing" not in ended.output


@pytest.mark.parametrize(
    ("way", "of_keras"), [("evolved", False), ("biases", False), ("classifier", True), ("expanding", True)]
)
def test_training_is_that_of_the_training_recipe(
    way, of_keras, arguments, evolved_file, shared_data, monkeypatch, tmp_path
):
    """With epochs, to the bit: order, augmentation and classifier, also where weights that are folded have none."""
    original, trained = TrialTraining.train, []
    monkeypatch.setattr(TrialTraining, "train", lambda *of: trained.extend(original(*of)) or trained[-1:])
    name = "mobilenet_v2_w035_keras_imagenet_notop.npz"
    weights = str(shared_data / "weights" / name) if of_keras else arguments["weights"]
    changes = {"weights": weights, "ways": f"evolved={evolved_file}" if way == "evolved" else way, "batch_size": 30}
    compared(**arguments | changes, out_dir=tmp_path / "out")
    scheme = tmp_path / f"out/schemes/cifar10-{'none' if way == 'classifier' else 'extra100'}-{way}.json"
    report = called_with(train_cifar.main, {
        "data_dir": arguments["data_dir"], "weights": weights, "resolution": 32, "epochs": 2, "batch_size": 30,
        "seed": 1, "scheme": str(scheme), "learning_rate": 0.1, "logger": "none", "out_dir": tmp_path / "run",
    })  # fmt: skip
    _, row = rows_of(tmp_path / "out")
    assert (report["top1"], report["val_top1"]) == (pytest.approx(row.top1), pytest.approx(row.val_top1))
    whole = torch.load(tmp_path / "run/last.ckpt", weights_only=True)["state_dict"]
    ours = trained[1].network.state_dict()
    assert all(torch.equal(value, whole[f"net.{name}"]) for name, value in ours.items())
    assert not torch.equal(ours["classifier.1.weight"], trained[0].network.state_dict()["classifier.1.weight"])


# ---- the same, whether stopped or not


def test_stopped_and_begun_again(whole, finished, command, words, monkeypatch, trained):
    """Three trainings were not done, and the second of them is stopped once more."""
    lost = sorted((finished / "trainings").iterdir())[:3]
    for path in [*lost, finished / "results.csv", finished / "report.json"]:
        path.unlink()
    known = {path: path.read_bytes() for path in (finished / "trainings").iterdir()}
    original = seeded_trainings.train_once

    def stopped(*of):
        if len(trained) == 1:
            raise RuntimeError("interrupted by the test")
        original(*of)

    with monkeypatch.context() as patch:
        patch.setattr(seeded_trainings, "train_once", stopped)
        with pytest.raises(RuntimeError, match="interrupted by the test"):
            command(RECIPE, *words, "--out_dir", finished)
    assert not (finished / "report.json").exists()
    ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 0, ended.errors
    assert len(trained) == 3
    assert rows_of(finished) == rows_of(whole)
    assert {path: path.read_bytes() for path in known} == known


def test_results_are_written_as_soon_as_they_are_known(arguments, pretended, tmp_path, monkeypatch):
    """By the watcher, while others train."""
    kept, original = [], compare_trainings.keep_results

    def keep(*of):
        rows = original(*of)
        kept.append(len(rows_of(tmp_path / "out")))
        return rows

    monkeypatch.setattr(compare_trainings, "keep_results", keep)
    pretend = seeded_trainings.train_once

    def slow(training, path):
        pretend(training, path)
        if len(pretended) == 2:  # the next one waits until the watcher has seen these
            for _ in range(500):
                if kept:
                    break
                time.sleep(0.01)

    monkeypatch.setattr(seeded_trainings, "train_once", slow)
    compared(**arguments, out_dir=tmp_path / "out")
    assert 1 <= kept[0] < kept[-1] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--epochs", 1), "the work in .* was begun with epochs 2, not 1: go on with --config "),
        (("--learning_rate", 0.2), r"was begun with learning_rate 0\.1, not 0\.2"),
        (("--resolution", 48), "was begun with resolution 32, not 48"),
        (("--ways", "biases:batch_size=8"), r"biases is not what it was when the study in .* began \(.*ways.json\)"),
    ],
)
def test_another_study_in_the_folder_is_refused(changes, message, finished, command, words):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    ended = command(RECIPE, *words, *changes, "--out_dir", finished)
    assert (ended.status, ended.output) == (2, "")
    assert re.search(message, ended.errors), ended.errors
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_another_scheme_under_the_same_name_is_refused(finished, command, words, evolved_file):
    evolved_file.write_text(json.dumps({**EVOLVED.to_dict(), "bias_depth": 13}))
    try:
        ended = command(RECIPE, *words, "--out_dir", finished)
    finally:
        EVOLVED.save(evolved_file)
    assert ended.status == 2
    kept = finished / "schemes/cifar10-extra100-evolved.json"
    assert f"the study was begun with another scheme, {kept}: give that one, another name or" in ended.errors
    assert UpdateScheme.load(kept) == EVOLVED


def test_another_network_in_the_same_file_is_refused(finished, command, words, weights):
    content = weights.read_bytes()
    state = torch.load(weights, weights_only=True)
    state["state_dict"]["net.classifier.1.bias"] += 1
    torch.save(state, weights)
    try:
        ended = command(RECIPE, *words, "--out_dir", finished)
    finally:
        weights.write_bytes(content)
    assert ended.status == 2
    assert f"{weights} is not what it was when the study in {finished} began" in ended.errors


def test_what_may_change(finished, whole, command, words, tiny_cifar, tmp_path, trained):
    """Where the data lie, how many processes there are, and what tells of it."""
    shutil.copytree(tiny_cifar, tmp_path / "moved")
    ended = command(
        RECIPE, *words, "--data_dir", tmp_path / "moved", "--processes", 2, "--logger", "csv", "--out_dir", finished
    )
    assert ended.status == 0, ended.errors
    assert not trained
    assert rows_of(finished) == rows_of(whole)


def test_it_may_grow(finished, whole, command, words, arguments, pretended):
    """By ways, budgets and seeds: only what is new is trained, and what it had stays."""
    more = ("--ways", f"{arguments['ways']},full", "--seeds", 3, "--budgets", "extra100,peak200")
    ended = command(RECIPE, *words, *more, "--out_dir", finished)
    assert ended.status == 0, ended.errors
    old, rows = rows_of(whole), rows_of(finished)
    assert {row.key: row for row in rows}.items() >= {row.key: row for row in old}.items()
    assert len(rows) == 2 * 4 * 3 + 3
    assert all(one.seed == 2 or one.case.way == "full" or one.case.budget == "peak200" for one in pretended)
    # and fewer ways forget nothing
    assert command(RECIPE, *words, "--ways", "biases", "--out_dir", finished).status == 0
    assert len(rows_of(finished)) == len(rows)
    (comparison,) = report_of(finished)["comparisons"]
    assert [entry["way"] for entry in comparison["ways"]] == ["biases"]


def test_folder_of_something_else_is_refused(command, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert ended.status == 2
    assert f"{tmp_path}/out holds thesis.txt, but no config.yaml of this recipe: give another --out_dir" in ended.errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_folder_of_another_process_is_refused(finished, command, words):
    with FileLock(finished / ".claims" / "study.lock"):
        ended = command(RECIPE, *words, "--out_dir", finished)
    assert ended.status == 2
    assert f"another process is at the study in {finished}: wait for it" in ended.errors


# ---- on equal terms


def study_of(ways, tmp_path, base_depth=36, **terms):
    task = TransferTask("digits", "none", data_options={"classes": [0, 1]}, resolution=32, learning_rates=(0.1, 0.2))
    given = {"learning_rate": 0.1, "warmup_fraction": 0.2, "seeds": 2, "features_limit_mib": 100.0} | terms
    if "epochs" not in given:
        given = {"steps": 20} | given
    terms = TermOptions(**given).filled_in(has_task_rates=False)
    return Study({"digits": task}, load_ways(ways), ["fp32"], ["extra64"], base_depth, None, terms, tmp_path)


def planned(study):
    """All trainings, each with a scheme of one bias."""
    described = study.described("digits", "fp32")
    return trainings_of(study, {case: [UpdateScheme(described.name, 1)] * 2 for case in study.cases()}, {})


def test_terms_are_equal(tmp_path):
    """Trainings differ in what their way says and in the seed alone."""
    study = study_of("biases,taylor=full:criterion=taylor,alone=full:batch_size=1,other=full:learning_rate=7", tmp_path)
    trainings = planned(study)
    assert [(one.case.way, one.case.budget, one.seed) for one in trainings] == [
        (name, budget, seed)
        for name, budget in (("taylor", "none"), ("alone", "none"), ("other", "none"), ("biases", "extra64"))
        for seed in (0, 1)
    ]
    of_way = {one.case.way: one for one in trainings}
    assert {name: one.learning_rate for name, one in of_way.items()} == {
        "biases": 0.1, "taylor": 0.1, "alone": pytest.approx(0.1 / 32), "other": 7,
    }  # fmt: skip
    assert of_way["taylor"].way.choice.criterion == "taylor"
    assert {one.warmup_fraction for one in trainings} == {0.2}
    assert not any(one.as_recipe or one.is_rate_chosen for one in trainings)
    biases, alone = of_way["biases"].settings, of_way["alone"].settings
    assert of_way["taylor"].settings == of_way["other"].settings == biases
    # as many samples, and what the trunk makes of them where it is the same
    assert (biases.steps, biases.batch_size, alone.steps, alone.batch_size) == (20, 32, 640, 1)
    assert dataclasses.replace(alone, steps=20, batch_size=32) == biases


@pytest.mark.parametrize(
    ("changes", "steps", "copies"),
    [
        ({"steps": 20}, 20, 3),  # 260 samples are nine batches
        ({"steps": 100}, 100, 4),
        ({"epochs": 6}, 54, 6),
        ({"epochs": 1, "batch_size": 7}, 37, 1),  # without the last one, of one sample
    ],
)
def test_steps_and_augmentations(changes, steps, copies, tmp_path):
    settings = study_of("biases", tmp_path, **changes).settings("digits", "fp32")
    assert (settings.steps, settings.copies) == (steps, copies)


def test_with_epochs_each_seed_augments_in_its_own_way(tmp_path):
    trainings = planned(study_of("biases", tmp_path, epochs=1))
    assert [one.recipe_seed for one in trainings] == [0, 1]
    assert [one.recipe_seed for one in planned(study_of("biases", tmp_path))] == [None, None]


def test_schemes_deeper_than_the_base_depth_train_the_whole_network(tmp_path):
    study = study_of("biases", tmp_path, base_depth=20)
    at, beyond = (study.settings("digits", "fp32", Way("biases"), depth) for depth in (20, 21))
    assert (at.base_depth, at.features) == (20, "disk")
    assert (beyond.base_depth, beyond.features) == (51, "none")
    # a network with fewer layers is cut where it begins
    assert study_of("biases", tmp_path, base_depth=90).settings("digits", "fp32").base_depth == 51


def test_default_learning_rate_and_width(arguments, pretended, tmp_path):
    changes = {"ways": "biases,last_layers", "weights": "none", "width": 0.5, "learning_rate": None, "seeds": 1}
    report = compared(**arguments | changes, out_dir=tmp_path / "out")
    assert {one.learning_rate for one in pretended} == {0.1 / 256 * 16}
    assert {one.settings.width for one in pretended} == {0.5}
    assert UpdateScheme.load(tmp_path / "out/schemes/cifar10-extra100-biases.json").network == "mobilenet_v2-w0.5"
    (comparison,) = report["comparisons"]
    assert comparison["ways"][0]["top1_std"] is None
    assert (comparison["ways"][1]["difference"], comparison["ways"][1]["interval"]) == (0, None)


# ---- learning rates that are chosen


def test_rates_are_chosen_where_they_are_asked_for(arguments, pretended, tmp_path):
    """By another seed and the validation split, at one budget, in proportion to the batch; or that of another way."""
    ways = "biases,alone=biases:batch_size=8,like=biases:criterion=random:rate_of=alone,fixed=biases:learning_rate=3"
    changes = {"ways": ways, "learning_rate": None, "learning_rates": "0.1,0.4", "budgets": "extra64,extra100"}
    compared(**arguments | changes | {"rate_budget": "extra100"}, out_dir=tmp_path / "out")
    tried = [one for one in pretended if one.splits == ("val",)]
    assert {one.seed for one in tried} == {1000}
    assert {one.case.budget for one in tried} == {"extra100"}
    assert {one.case.way for one in tried} == {"biases", "alone"}
    rates = {(row.way, row.budget): row.learning_rate for row in rows_of(tmp_path / "out")}
    lowest = min(one.learning_rate for one in tried if one.case.way == "biases")  # all are as good, and tried further
    assert rates["biases", "extra64"] == rates["biases", "extra100"] == pytest.approx(lowest)
    assert rates["alone", "extra64"] == pytest.approx(lowest / 2)
    assert rates["like", "extra100"] == pytest.approx(lowest)
    assert rates["fixed", "extra64"] == 3


# ---- every kind of way, on data sets from a list


TINY = {"steps": 3, "batch_size": 16, "seeds": 1, "base_depth": 8, "logger": "none"}


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """The digits under the name of a data set that tables know."""
    path = tmp_path_factory.mktemp("list") / "data_sets.json"
    digits = {"data": "digits", "weights": "none", "resolution": 32, "learning_rates": [0.05]}
    path.write_text(json.dumps({"cifar10": digits}))
    return path


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """The ready ways with few evaluations."""
    ways = json.loads(Path("recipes/studies/ways/methods.json").read_text())
    for way in ways.values():
        if way["scheme"] == "accuracy":
            way["evaluations"] = 1  # the best by the gradient, whose channels are open
    ways["dynamic"] |= {"rechoose_every": 2, "choice_samples": 16}
    path = tmp_path_factory.mktemp("ways") / "methods.json"
    path.write_text(json.dumps(ways))
    return path


@pytest.fixture(scope="module")
def measured(data_sets, methods, tmp_path_factory):
    """The folder of a study of every method."""
    out_dir = tmp_path_factory.mktemp("results") / "run"
    compared(data_sets=data_sets, ways_file=methods, budgets="extra64", **TINY, out_dir=out_dir)
    return out_dir


def test_every_method_has_its_row_within_the_budget(measured):
    rows = rows_of(measured)
    assert [row.way for row in rows] == list(METHODS)
    assert {(row.numbers, row.seed, row.steps, row.batch_size) for row in rows} == {("fp32", 0, 3, 16)}
    assert all(row.extra_memory_bytes <= 64 * 1024 for row in rows if row.way != "full")
    by_way = {row.way: row for row in rows}
    assert by_way["full"].bias_depth == by_way["full"].updated_layers == 51
    assert by_way["biases"].updated_layers == 0 < by_way["biases"].bias_depth
    assert by_way["dynamic"].extra_memory_bytes == by_way["sub_tensor"].extra_memory_bytes
    assert by_way["dynamic"].peak_memory_bytes > by_way["sub_tensor"].peak_memory_bytes  # the scores
    assert by_way["one_pass"].search_seconds > 0 == by_way["last_layers"].search_seconds


def test_searched_schemes_are_what_their_ways_say(measured):
    """Whole layers, or channels that are fixed, or only how many."""
    schemes = {
        way: UpdateScheme.load(measured / "schemes" / f"cifar10-extra64-{way}.json")
        for way in ("layers", "sub_tensor", "one_pass", "dynamic")
    }
    assert set(schemes["layers"].weights.values()) <= {1.0}
    for way in ("sub_tensor", "one_pass"):
        scheme = schemes[way]
        assert set(scheme.channels) == {layer for layer, ratio in scheme.weights.items() if ratio < 1}
    assert schemes["dynamic"].weights == schemes["sub_tensor"].weights
    assert not schemes["dynamic"].channels


def test_rates_are_chosen_without_the_test_split(measured):
    trainings = [json.loads(path.read_text()) for path in (measured / "trainings").iterdir()]
    assert {tuple(one["top1"]) for one in trainings} == {("val",), ("val", "test")}
    # the search of one evaluation shares the scheme of one pass, and that may have no other best one in multiples of 4
    for splits in (1, 2):
        assert sum(len(one["top1"]) == splits for one in trainings) in (len(METHODS) - 2, len(METHODS) - 1)


def test_searches_are_done_once(measured, data_sets, methods, trained, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(measured, folder)
    monkeypatch.setattr(compare_trainings, "search_once", lambda search: pytest.fail(f"{search.folder} again"))
    compared(data_sets=data_sets, ways_file=methods, budgets="extra64", **TINY, out_dir=folder)
    assert not trained
    assert rows_of(folder) == rows_of(measured)


def test_a_failed_search_is_missing(data_sets, pretended, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compare_trainings, "search_once", lambda search: "it went wrong")
    report = compared(data_sets=data_sets, ways="biases,gradient", budgets="extra64", **TINY, out_dir=tmp_path / "out")
    assert report["missing"] == [
        "gradient in fp32 within extra64 on cifar10, seed 0: no scheme or learning rate was found for it"
    ]
    assert "it went wrong" in caplog.messages


def test_another_list_of_data_sets_is_refused(measured, data_sets, methods, command, tmp_path):
    folder, before = tmp_path / "again", data_sets.read_text()
    shutil.copytree(measured, folder)
    data_sets.write_text(before.replace('"resolution": 32', '"resolution": 48'))
    words = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    try:
        ended = command(
            RECIPE,
            "--data_sets",
            data_sets,
            "--ways_file",
            methods,
            "--budgets",
            "extra64",
            *words,
            "--out_dir",
            folder,
        )
    finally:
        data_sets.write_text(before)
    assert ended.status == 2
    assert f"cifar10 is not what it was when the study in {folder} began ({folder}/data_sets.json)" in ended.errors


def test_results_are_rendered(measured, command, tmp_path):
    ended = command("render_results", "--results", measured / "results.csv", "--out_dir", tmp_path / "rendered")
    assert ended.status == 0, ended.errors
    assert "evolved, sub-tensors" in (tmp_path / "rendered" / "results.md").read_text()
    assert (tmp_path / "rendered" / "accuracy_over_memory_cifar10.png").exists()


# ---- int8


@pytest.fixture
def int8(here, small_graph, small_tensors):
    """An own current folder that holds a small int8 network for digits, a scheme for it, and other weights."""
    first = dataclasses.replace(small_graph.first_conv, in_channels=1)
    changes = {"input_shape": (1, 32, 32), "normalization": ((0.5,), (0.5,)), "first_conv": first}
    weight = {"first_conv.weight": small_tensors["first_conv.weight"][:, :1].contiguous()}
    graph = dataclasses.replace(small_graph, **changes)
    write_quantized_network(here / "network.safetensors", graph, small_tensors | weight)
    torch.save(mobilenet_v2(0.1, num_classes=2, in_channels=1).state_dict(), here / "weights.pth")
    return [
        *("--data", "digits", "--data_options", '{"classes": [0, 1]}', "--network", "network.safetensors"),
        *("--weights", "weights.pth", "--width", 0.1, "--resolution", 32, "--batch_size", 64, "--seeds", 1),
        *("--budgets", "none", "--scheme", "full", "--epochs", 1, "--logger", "none", "--out_dir", "out"),
    ]


@pytest.fixture
def ways_file():
    return Path(compare_trainings.__file__).parent / "ways/int8.json"


def test_ways_to_train_int8_beside_floating_point(int8, ways_file, command, here):
    ended = command(RECIPE, *int8, "--ways_file", ways_file)
    assert ended.status == 0, ended.errors
    rows = rows_of(here / "out")
    names = ["float", "latent", "in_place", "unscaled", "in_place_batch_1"]
    assert [(row.way, row.numbers) for row in rows] == [(name, "fp32" if name == "float" else "int8") for name in names]
    peak = {row.way: row.peak_memory_bytes for row in rows}
    assert peak["latent"] == peak["unscaled"] > peak["in_place"] == peak["in_place_batch_1"]  # copies take room
    rates = {row.way: row.learning_rate for row in rows}
    assert rates["in_place_batch_1"] == pytest.approx(rates["in_place"] / 64)
    (comparison,) = report_of(here / "out")["comparisons"]
    top1 = {row.way: row.top1 for row in rows}
    for entry in comparison["ways"][1:]:
        assert entry["difference"] == pytest.approx(top1["float"] - top1[entry["way"]])
    files = {path.name for path in (here / "out/schemes").iterdir()}
    assert files == {"digits-none-float.json", *(f"digits-none-{name}-int8.json" for name in names[1:])}


def test_without_a_validation_split_the_test_split_is_measured(command, words, tmp_path):
    more = ("--ways", "biases", "--seeds", 1, "--data_options", '{"validation_fraction": 0}')
    ended = command(RECIPE, *words, *more, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    (row,) = rows_of(tmp_path / "out")
    assert row.val_top1 is None
    for choosing in (("--ways", "gradient"), ("--learning_rate", "null", "--learning_rates", "0.1,0.2")):
        ended = command(RECIPE, *words, *more, *choosing, "--out_dir", tmp_path / "other")
        assert (ended.status, ended.output) == (2, "")
        assert "cifar10 has no validation split, by which schemes and learning rates are chosen" in ended.errors


# ---- trainings that come to no end


def test_lost_and_diverged_trainings_are_missing(arguments, pretended, command, words, monkeypatch, tmp_path):
    """A worker that died leaves nothing, and a diverged training no loss; the others are compared."""
    pretend = seeded_trainings.train_once

    def train(training, path):
        pretend(training, path)
        if (training.case.way, training.seed) == ("evolved", 0):
            Path(path).unlink()
        elif training.case.way == "biases":
            found = json.loads(Path(path).read_text())
            Path(path).write_text(json.dumps(found | {"loss": None}))

    monkeypatch.setattr(seeded_trainings, "train_once", train)
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    report = report_of(tmp_path / "out")
    within = "in fp32 within extra100 on cifar10"
    assert report["missing"] == [
        f"evolved {within}, seed 0: lost with its worker; the same command tries again",
        f"biases {within}, seed 0: diverged at learning rate 0.1: give it a smaller one",
        f"biases {within}, seed 1: diverged at learning rate 0.1: give it a smaller one",
    ]
    assert all(f"missing: {line}\n" in ended.output for line in report["missing"])
    evolved, last_layers, biases, _ = report["comparisons"][0]["ways"]
    assert (evolved["top1"], last_layers["top1"], biases["top1"]) == ({"1": 0.51}, {"0": 0.5, "1": 0.51}, {})
    assert (last_layers["difference"], last_layers["interval"]) == (0, None)  # of the seed that both have
    assert re.search(r"│ biases +│ +│ +missing │", ended.output)
    assert len(rows_of(tmp_path / "out")) == 5


def test_where_nothing_comes_out_that_is_an_error(command, words, monkeypatch, tmp_path):
    monkeypatch.setattr(seeded_trainings, "train_once", lambda *_: None)
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.splitlines()[-1] == (
        f"{RECIPE}.py: error: evolved in fp32 within extra100 on cifar10, seed 0: lost with its worker; the same "
        "command tries again"
    )


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
    with (finished / "results.csv").open(newline="") as opened:
        columns, *rows = csv.reader(opened)
    assert logged["columns"] == columns
    assert len(logged["data"]) == len(rows)
    (picture,) = run.glob("files/media/images/comparison*.png")
    assert picture.read_bytes() == (finished / "comparison.png").read_bytes()


# ---- wrong input


MISTAKES = {
    "nothing": (("--ways", ""), "there is nothing to compare: give --ways such as evolved=scheme.json"),
    "unknown way": (("--ways", "biases,best"), "way 'best' is none: give name=FILE.json, or one of last_layers"),
    "missing file": (("--ways", "a=nowhere.json"), r"nowhere\.json: cannot read the update scheme: No such file"),
    "over the budget": (("--budgets", "extra20"), r"scheme evolved needs 26\.3 KiB of extra memory, but the budget is"),
    "unknown budget": (("--budgets", "z80"), "budget is 'z80': give KiB of extra memory such as extra64"),
    "no budget": (("--budgets", "none"), "last_layers fills a budget: give one with --budgets"),
    "no search without one": (("--ways", "gradient", "--budgets", "none"), "way gradient searches within a budget"),
    "no cases": (("--ways", "biases:numbers=int8"), "there is no int8 network for cifar10: give it, or leave int8 out"),
    "rate budget": (("--rate_budget", "extra64"), "rate_budget is extra64: give one of --budgets, extra100"),
    "unknown numbers": (("--numbers", "fp16"), "numbers has 'fp16': give some of fp32, int8"),
    "rates twice": (("--learning_rates", "0.1,0.2"), r"learning_rate is 0\.1 beside learning_rates 0\.1,0\.2: leave"),
    "rate 0": (("--learning_rate", "null", "--learning_rates", "0,1"), "cifar10: learning_rates is 0.0: it should be"),
    "epochs and steps": (("--steps", 5), "epochs is 2 beside steps 5: leave one of them out"),
    "list and data": (("--data_sets", "list.json"), r"data_sets is list\.json beside data cifar10: leave one"),
    "only": (("--only", "cifar10"), "data is cifar10 beside only cifar10: leave one of them out"),
    "no data": (("--data", "null"), "there is no data: give --data, or a list of data sets with --data_sets"),
    "epochs 0": (("--epochs", 0), "epochs is 0: give 1 or more"),
    "seeds 0": (("--seeds", 0), "seeds is 0: give 1 or more"),
    "processes 0": (("--processes", 0), "processes is 0: give 1 or more"),
    "batch_size 0": (("--batch_size", 0), "batch_size is 0: give 1 or more"),
    "missing table": (("--contributions", "nowhere.csv"), r"nowhere\.csv: .*cannot"),
    "scheme before data": (("--ways", "a=nowhere.json", "--data_dir", "absent"), r"nowhere\.json: cannot read the upd"),
    "budget before all": (("--ways", "a=nowhere.json", "--budgets", "z80"), "budget is 'z80': give KiB of extra"),
    "missing weights": (("--weights", "nowhere.npz"), r"nowhere\.npz"),
    "other network": (("--network", "resnet18"), "network is 'resnet18': give mobilenet_v2, or the .safetensors file"),
    "width": (("--width", 0.5), "the scheme is for mobilenet_v2-w0.35, but the network is mob"),
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


def test_case_in_words():
    assert str(Case("cifar10", "int8", "extra64", "biases")) == "biases in int8 within extra64 on cifar10"
    assert str(Case("cifar10", "fp32", "none", "full")) == "full in fp32 on cifar10"
