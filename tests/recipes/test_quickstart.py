"""The quickstart, shortened to one epoch and one seed: what it leaves behind."""

import json
import operator
import random
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from PIL import Image

from microtune.datamodules.digits import Digits
from microtune.modules.classifier import Classifier
from microtune.modules.memory.microcontrollers import Fit, microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import autograd_bytes_per_sample, extra_memory_bytes, flash_bytes
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes import quickstart
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.contribution_trials import Update
from microtune.recipes.search.table_search import make_problem
from microtune.recipes.search.workers import Workers

METHODS = ["classifier", "biases", "last_layers", "sub_tensor", "full", "evolved"]
KEYS = {
    *("top1_mean", "top1_std", "extra_memory_bytes", "peak_memory_bytes"),
    *("autograd_bytes_per_sample", "step_seconds", "fits"),
}
SHORT = {"PRETRAINING_EPOCHS": 1, "ADAPTATION_EPOCHS": 1, "TRIAL_STEPS": 2, "RATIOS": (1.0,), "EVALUATIONS": 80}
SCHEMES = sorted((Path(quickstart.__file__).parent / "schemes").glob("*_digits_*.json"))
# one layer is worth having, another is not
TABLE = ContributionTable(
    (
        Contribution("bias", 48, "", 0.0, 0.03, 0.0, 1),
        Contribution("weight", 48, "features.7.conv.0.0", 1.0, 0.2, 0.0, 1),
        Contribution("weight", 48, "features.9.conv.0.0", 1.0, -0.1, 0.0, 1),
    )
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run for all tests: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(quickstart, name, value)
        report = quickstart.main(seeds=1, processes=1, logger="none", out_dir=folder)
    return SimpleNamespace(folder=folder, report=report)


@pytest.fixture(scope="module")
def operations():
    return find_operations(mobilenet_v2(0.35, num_classes=5, in_channels=1), (1, 32, 32))


@pytest.fixture(scope="module")
def described():
    return quickstart.describe_network("none", (1, 32, 32), 5)


def test_report(run):
    report = json.loads((run.folder / "report.json").read_text())
    assert report == run.report
    assert (report["mcu"], report["budget_bytes"]) == ("rp2040", microcontroller("rp2040").budget_bytes)
    assert list(report["methods"]) == METHODS
    for row in report["methods"].values():
        assert row.keys() == KEYS
        assert 0 <= row["top1_mean"] <= 1
        assert row["top1_std"] == 0  # of one seed
        assert row["step_seconds"] > 0


def test_full_update_does_not_fit_and_all_others_do(run):
    fits = {name: row["fits"] for name, row in run.report["methods"].items()}
    assert fits == {name: name != "full" for name in METHODS}
    for row in run.report["methods"].values():
        assert row["fits"] is (row["peak_memory_bytes"] <= run.report["budget_bytes"])


@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_the_saved_scheme(method, run, operations):
    scheme = UpdateScheme.load(run.folder / f"scheme_{method}.json")
    scheme.check(operations.convolutions, "mobilenet_v2-w0.35")
    row = run.report["methods"][method]
    assert row["extra_memory_bytes"] == extra_memory_bytes(operations.convolutions, 112, scheme)
    assert row["peak_memory_bytes"] == PeakMemory(operations).peak_bytes(scheme)
    if method != "full":  # which trains the plain network, with a float per element for ReLU6
        assert row["autograd_bytes_per_sample"] == autograd_bytes_per_sample(operations, scheme)


def test_sub_tensors_save_fewer_bytes_than_full_update(run):
    saved = {name: row["autograd_bytes_per_sample"] for name, row in run.report["methods"].items()}
    assert saved["classifier"] < saved["sub_tensor"] < saved["full"]


def test_picture(run):
    with Image.open(run.folder / "report.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)
    assert {path.name for path in run.folder.iterdir()} == {
        *("config.yaml", "report.json", "report.png", "contributions.csv", "contributions.png"),
        *(f"scheme_{method}.json" for method in METHODS),
    }


def test_evolved_scheme_is_the_best_by_the_saved_table(run, described):
    scheme = UpdateScheme.load(run.folder / "scheme_evolved.json")
    table = ContributionTable.load(run.folder / "contributions.csv")
    device = microcontroller("rp2040")
    problem = make_problem(described, table, Budget("peak", device.budget_bytes, device))
    found = scheme.provenance
    assert found == {
        "command": "uv run recipes/quickstart.py --mcu rp2040",
        "mcu": "rp2040",
        "budget_bytes": device.budget_bytes,
        "score": pytest.approx(problem.score(problem.genome_of(scheme))),
        "optimum_score": pytest.approx(quickstart.proven_optimum(problem).score),
    }
    assert 0.9 * found["optimum_score"] <= found["score"] <= found["optimum_score"] + 1e-12


@pytest.mark.parametrize("head_convolution", [False, True])
def test_evolution_keeps_to_what_gains(head_convolution, capsys):
    described = quickstart.describe_network("none", (1, 32, 32), 5, head_convolution=head_convolution)
    scheme = quickstart.evolve_scheme(described, TABLE, microcontroller("stm32f411"))
    assert (scheme.bias_depth, scheme.weights) == (48, {"features.7.conv.0.0": 1.0})
    assert scheme.provenance["command"].endswith(" --head_convolution true") is head_convolution
    assert "its gains sum up to 23.0 points, those of the proven optimum to 23.0\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A network that knows a little, as other processes find it."""
    found = quickstart.Pretrained(str(tmp_path_factory.mktemp("pretrained") / "pretrained.pth"), False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "PRETRAINING_EPOCHS", 4)
        torch.save(quickstart.pretrain(quickstart.describe(False)), found.weights)
    return found


@pytest.fixture
def short(monkeypatch):
    """Few updates, and trainings of a moment."""
    for name, value in {**SHORT, "BASE_DEPTH": 6, "BIAS_DEPTHS": (3,)}.items():
        monkeypatch.setattr(quickstart, name, value)
    quickstart.trials_from.cache_clear()
    yield
    quickstart.trials_from.cache_clear()


def test_contributions_are_reproducible_and_without_test_images(short, pretrained, monkeypatch, capsys):
    monkeypatch.setattr(Digits, "test_dataloader", lambda self: pytest.fail("a test image was seen"))
    tables = []
    for _ in range(2):
        quickstart.trials_from.cache_clear()
        tables.append(quickstart.measure_contributions(pretrained, Workers()))
    assert tables[0] == tables[1]
    assert [(row.kind, row.bias_depth, row.layer[:11]) for row in tables[0].rows] == [
        ("bias", 6, ""),
        ("bias", 3, ""),
        ("weight", 6, "features.16"),
        ("weight", 6, "features.17"),
    ]
    assert "measured the gains of 4 updates by 5 trainings of 2 steps" in capsys.readouterr().out


def test_trainings_do_not_depend_on_what_their_process_did_before(short, pretrained, monkeypatch):
    """So that the number of processes changes no result."""
    updates = [Update("bias", 6), Update("weight", 6, "features.16.conv.0.0", 1.0)]
    schemes = [None, UpdateScheme("mobilenet_v2-w0.35", 6, {"features.16.conv.0.0": 1.0})]
    monkeypatch.setattr(quickstart, "TRIAL_STEPS", 20)
    calls = [(quickstart.trial_top1, update, seed) for update in updates for seed in (0, 1)]
    calls += [(quickstart.adapt, scheme, 1) for scheme in schemes]
    first = [function(pretrained, *arguments) for function, *arguments in calls]
    assert len(set(first)) > 3  # else they would be equal for the wrong reason
    random.seed(0)
    torch.manual_seed(5)
    quickstart.trials_from.cache_clear()
    backwards = [function(pretrained, *arguments) for function, *arguments in reversed(calls)]
    assert backwards[::-1] == first


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_are_in_the_order_of_the_calls(processes):
    workers = SimpleNamespace(processes=processes, map=lambda function, *of: list(map(function, *of)))
    assert quickstart.evaluated(workers, "adding", operator.add, [1, 2, 3], [10, 20, 30]) == [11, 22, 33]


def test_a_training_that_is_lost_with_its_process_is_an_error():
    workers = SimpleNamespace(processes=2, map=lambda function, *of: [1.0, None])
    with pytest.raises(UserError, match=r"a training was lost with its process, .*: give --processes 1"):
        quickstart.evaluated(workers, "adding", operator.add, [1, 2], [10, 20])


@pytest.mark.parametrize(("cores", "given", "taken"), [(2, None, 2), (64, None, 8), (64, 16, 16), (2, 1, 1)])
def test_as_many_processes_as_there_are_cores(cores, given, taken, monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def started(processes):
        assert processes == taken
        raise Stop

    monkeypatch.setattr(quickstart.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(quickstart, "Workers", started)
    with pytest.raises(Stop):
        quickstart.main(processes=given, logger="none", out_dir=tmp_path / "out")


@pytest.mark.parametrize("path", SCHEMES, ids=lambda path: path.stem)
def test_committed_scheme_fits_its_microcontroller(path, operations):
    scheme = UpdateScheme.load(path)
    scheme.check(operations.convolutions, "mobilenet_v2-w0.35")
    device = microcontroller(path.stem.split("_")[-1])
    fit = Fit(device, PeakMemory(operations).peak_bytes(scheme), flash_bytes(operations, scheme))
    assert fit.fits
    assert scheme.weights  # more than biases
    provenance = scheme.provenance
    assert (provenance["mcu"], provenance["budget_bytes"]) == (device.name, device.budget_bytes)
    assert provenance["command"] == f"uv run recipes/quickstart.py --mcu {device.name}"
    assert provenance["score"] <= provenance["optimum_score"] + 1e-12


def test_three_schemes_are_committed():
    assert len(SCHEMES) == 3


def test_mean_and_deviation_over_seeds(monkeypatch, capsys, tmp_path):
    """With training left out: the statistics, the table, and the line that says where everything lies."""
    top1 = {0: 0.5, 1: 0.75, 2: 0.7}
    monkeypatch.setattr(quickstart, "pretrain", lambda described: {})
    monkeypatch.setattr(quickstart, "measure_contributions", lambda pretrained, workers: TABLE)
    monkeypatch.setattr(quickstart, "adapt", lambda pretrained, scheme, seed: top1[seed])
    report = quickstart.main(seeds=3, processes=1, logger="none", out_dir=tmp_path / "out")
    for row in report["methods"].values():
        assert row["top1_mean"] == pytest.approx(0.65)
        assert row["top1_std"] == pytest.approx(statistics.stdev(top1.values()))
    printed = capsys.readouterr().out
    for method in METHODS:
        assert method in printed
    assert "65.0 ± 13.2" in printed
    assert max(map(len, printed.split("done in")[0].splitlines())) <= 80  # a terminal's width
    assert printed.endswith(f"{tmp_path / 'out'}\n")


def test_logs_to_weights_and_biases_offline(run, monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    quickstart.log_to_wandb("wandb", run.report, folder)
    wandb.teardown()
    (files,) = folder.glob("wandb/offline-run-*/files")
    (table,) = files.glob("media/table/methods_*.table.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == METHODS
    (picture,) = files.glob("media/images/report_*.png")
    assert picture.read_bytes() == (run.folder / "report.png").read_bytes()
    (picture,) = files.glob("media/images/contributions_*.png")
    assert picture.read_bytes() == (run.folder / "contributions.png").read_bytes()


def test_adaptation_changes_what_its_scheme_updates(run, described, pretrained, monkeypatch):
    """The network that is tested has a new classifier, the scheme's update, and else the pretrained weights."""
    monkeypatch.setattr(quickstart, "ADAPTATION_EPOCHS", 1)
    tested, original = [], Classifier.on_test_epoch_end
    monkeypatch.setattr(Classifier, "on_test_epoch_end", lambda self: tested.append(self) or original(self))
    scheme = UpdateScheme.load(run.folder / "scheme_last_layers.json")
    quickstart.adapt(pretrained, scheme, seed=0)
    trained, before = tested[0].net.state_dict(), pretrained.state()
    changed = {name for name in trained if not trained[name].equal(before[name])}
    updated = [c.name for c in described.operations.convolutions[-scheme.bias_depth :]]
    expected = {f"{layer}.{part}" for layer in [*updated, "classifier.1"] for part in ("weight", "bias")}
    assert changed == expected
