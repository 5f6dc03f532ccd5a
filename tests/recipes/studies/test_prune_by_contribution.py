"""Pruning by contribution: the rows that are promised, really smaller networks, and a verdict that can say no."""

import csv
import json
import re
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import wandb
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from microtune.datamodules.data_sets import DataSet
from microtune.datamodules.digits import Digits
from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import build_network, mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.user_error import UserError
from microtune.recipes.studies import prune_by_contribution as recipe
from microtune.recipes.studies.prune_by_contribution import (
    FineTuning,
    chosen_units,
    keys_of,
    latency,
    prune_all,
    removed_alone,
    validation_features,
)
from microtune.recipes.studies.pruning_report import (
    UNPRUNED,
    PrunedRow,
    correlations,
    curves,
    single_unit_type,
    verdicts,
)
from microtune.recipes.studies.structured_pruning import ChannelGroup, find_groups, remove_units

COMMITTED = Path(recipe.__file__).parents[1] / "results/pruning"
SHAPE = (1, 16, 16)
DESCRIBED = {"width": 0.1, "num_classes": 10, "in_channels": 1, "folded": True, "padding": "symmetric"}
CRITERIA = ["contribution", "magnitude", "random"]
UNITS = 40

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def short_latency():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LATENCY_PASSES", 2)
        patch.setattr(recipe, "BATCH_PASSES", 1)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folded network that knows three digits in four after two epochs."""
    data = Digits(resolution=16, batch_size=32)
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = mobilenet_v2(0.1, num_classes=10, in_channels=1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.3
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for batch in [*data.train_dataloader()] * 2:
        images, labels = data.on_after_batch_transfer(batch, 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
    folded = fold_batch_norm(network.eval(), SHAPE)
    path = tmp_path_factory.mktemp("weights") / "digits.ckpt"
    torch.save(
        {
            "state_dict": {f"net.{name}": value for name, value in folded.state_dict().items()},
            "hyper_parameters": {"network": DESCRIBED, "class_names": list("0123456789"), "input_shape": list(SHAPE)},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def arguments(weights):
    return {
        "data": "digits",
        "weights": str(weights),
        "resolution": 16,
        "criteria": ",".join(CRITERIA),
        "sparsities": "0.3,0.1",
        "choice_samples": 40,
        "fine_tuning_steps": 3,
        "learning_rate": 0.01,
        "seeds": 2,
        "single_units": UNITS,
        "logger": "none",
    }


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder and the report of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "pruning"
    return folder, recipe.main(**arguments, out_dir=folder)


@pytest.fixture(scope="module")
def network(weights):
    built = build_network(**DESCRIBED)
    state = torch.load(weights, weights_only=True)["state_dict"]
    built.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    return built.eval()


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def top1_of(network, split):
    data = Digits(resolution=16, augment=True)
    data.setup()
    correct = count = 0
    with torch.no_grad():
        for batch in getattr(data, f"{split}_dataloader")():
            images, labels = data.on_after_batch_transfer(batch, 0)
            correct += int((network(images).argmax(1) == labels).sum())
            count += len(labels)
    return correct / count


def test_every_network_has_its_row(finished):
    rows = read_rows(finished[0] / "pruning.csv", PrunedRow)
    keys = [row.key for row in rows]
    pairs = [(criterion, sparsity) for criterion in CRITERIA for sparsity in (0.1, 0.3)]
    once = {(UNPRUNED, 0.0, 0, False)} | {(*pair, 0, False) for pair in pairs} | {("random", 0.1, 1, False)}
    once |= {("random", 0.3, 1, False)}
    tuned = {(*pair, seed, True) for pair in [(UNPRUNED, 0.0), *pairs] for seed in (0, 1)}
    assert set(keys) == once | tuned
    assert len(keys) == len(set(keys)) == 9 + 14
    assert keys == keys_of(CRITERIA, [0.1, 0.3], 2, True)
    assert keys_of(CRITERIA, [0.1, 0.3], 2, False) == keys[:9]


def test_the_unpruned_network_is_the_one_that_was_given(finished, network):
    row = read_rows(finished[0] / "pruning.csv", PrunedRow)[0]
    assert row.key == (UNPRUNED, 0.0, 0, False)
    assert (row.top1, row.val_top1) == (top1_of(network, "test"), top1_of(network, "val"))
    assert row.top1 > 0.5
    operations = find_operations(network, SHAPE)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    classifier = network.classifier[1]
    weights = sum(one.weight.numel() for one in convolutions) + classifier.weight.numel()
    biases = sum(one.bias.numel() for one in convolutions) + classifier.bias.numel()
    assert row.parameters == weights + biases
    assert row.flash_bytes == weights + 4 * biases
    assert row.peak_bytes == PeakMemory(operations).inference_peak_bytes


def test_pruned_networks_are_smaller_and_can_be_made_again(finished, network):
    folder, _ = finished
    unpruned, *rows = read_rows(folder / "pruning.csv", PrunedRow)
    assert len(list((folder / "removed").iterdir())) == 2 * 2 + 2 * 2
    for row in rows:
        if row.criterion == UNPRUNED:
            continue
        assert row.multiply_accumulates <= (1 - row.sparsity) * unpruned.multiply_accumulates
        assert row.parameters < unpruned.parameters
        assert row.flash_bytes < unpruned.flash_bytes
        assert row.peak_bytes <= unpruned.peak_bytes
        if not row.fine_tuned:
            removed = json.loads((folder / f"removed/{row.criterion}-{row.sparsity:g}-seed{row.seed}.json").read_text())
            again = remove_units(network, SHAPE, removed)
            assert sum(parameter.numel() for parameter in again.parameters()) == row.parameters
            assert top1_of(again, "val") == row.val_top1
            assert top1_of(again, "test") == row.top1


def test_fine_tuning_changes_what_it_should(finished):
    rows = {row.key: row for row in read_rows(finished[0] / "pruning.csv", PrunedRow)}
    for criterion in ("contribution", "magnitude"):
        before, after = rows[criterion, 0.1, 0, False], rows[criterion, 0.1, 0, True]
        assert before.multiply_accumulates == after.multiply_accumulates
        assert before.parameters == after.parameters
    one, other = (rows["random", 0.3, seed, False] for seed in (0, 1))
    assert one.parameters != other.parameters  # another order


def test_single_units_are_measured_as_if_removed(finished, network):
    units = read_rows(finished[0] / "single_units.csv", single_unit_type(*CRITERIA))
    groups = find_groups(network, SHAPE)
    assert len({(unit.group, unit.channel) for unit in units}) == len(units) == UNITS
    per_group = [sum(unit.group == group.name for unit in units) for group in groups]
    assert set(per_group) == {1, 2}  # 22 groups
    before = top1_of(network, "val")
    for unit in units[::8]:
        after = top1_of(remove_units(network, SHAPE, {unit.group: [unit.channel]}), "val")
        assert unit.accuracy_lost == pytest.approx(before - after, abs=1e-12)
        assert unit.kind == next(group.kind for group in groups if group.name == unit.group)


def test_the_report_holds_what_the_files_say(finished):
    folder, report = finished
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    units = read_rows(folder / "single_units.csv", single_unit_type(*CRITERIA))
    entries = {(one["criterion"], one["target"], one["kind"]): one for one in report["correlations"]}
    assert len(entries) == len(report["correlations"]) == 3 * 2 * 3
    for (criterion, target, kind), entry in entries.items():
        chosen = [unit for unit in units if kind in ("all", unit.kind)]
        rho = spearmanr([getattr(unit, criterion) for unit in chosen], [getattr(unit, target) for unit in chosen])
        assert entry["rho"] == pytest.approx(rho.statistic, abs=1e-12)
        low, high = entry["interval"]
        assert low < entry["rho"] < high
        assert ("difference" in entry) == (criterion != "contribution")
    rows = read_rows(folder / "pruning.csv", PrunedRow)
    tuned = {row.key: row.top1 for row in rows}
    (entry,) = [
        one
        for one in report["prunings"]
        if (one["criterion"], one["sparsity"], one["fine_tuned"]) == ("magnitude", 0.3, True)
    ]
    both = [tuned["magnitude", 0.3, seed, True] for seed in (0, 1)]
    assert entry["top1"] == {0: both[0], 1: both[1]}
    first = [tuned["contribution", 0.3, seed, True] for seed in (0, 1)]
    assert entry["difference"] == pytest.approx((sum(first) - sum(both)) / 2)
    for name in ("pruning.png", "single_units.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").resize((100, 60)).tobytes())) > 10


def test_what_is_there_is_not_done_again(finished, arguments, tmp_path, monkeypatch):
    folder, report = finished
    whole = (folder / "pruning.csv").read_text()
    units = (folder / "single_units.csv").read_text()
    lines = whole.splitlines()
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    (tmp_path / "single_units.csv").write_text(units)
    missing = (4, 12, 20)
    kept = [line for number, line in enumerate(lines) if number not in missing]
    (tmp_path / "pruning.csv").write_text("\n".join(kept) + "\n")
    done = []
    measured = recipe.measured
    monkeypatch.setattr(recipe, "measured", lambda *given: done.append(given[2]) or measured(*given))
    monkeypatch.setattr(recipe, "measure_alone", lambda *_: pytest.fail("the units were measured again"))
    again = recipe.main(**arguments, out_dir=tmp_path)
    keys = [row.key for row in read_rows(folder / "pruning.csv", PrunedRow)]
    assert done == [keys[number - 1] for number in missing]
    latencies = {"latency_ms", "latency_ratio", "batch_latency_ratio"}
    for row, other in zip(rows_of(folder / "pruning.csv"), rows_of(tmp_path / "pruning.csv"), strict=True):
        assert {k: v for k, v in row.items() if k not in latencies} == {
            k: v for k, v in other.items() if k not in latencies
        }
    assert again["correlations"] == report["correlations"]
    with pytest.raises(UserError, match=r"was begun with sparsities 0\.3,0\.1, not 0\.2"):
        recipe.main(**arguments | {"sparsities": "0.2"}, out_dir=tmp_path)


def test_without_fine_tuning_and_single_units(arguments, offline_run, monkeypatch, tmp_path, capsys):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    few = {"criteria": "fisher", "sparsities": "0.2", "fine_tuning_steps": 0, "single_units": 0}
    few |= {"channel_multiple": 8, "logger": "wandb"}
    report = recipe.main(**arguments | few, out_dir=tmp_path / "out")
    assert report["correlations"] == report["verdict"] == []
    assert [row.key for row in read_rows(tmp_path / "out/pruning.csv", PrunedRow)] == [
        (UNPRUNED, 0.0, 0, False),
        ("fisher", 0.2, 0, False),
    ]
    assert not (tmp_path / "out/single_units.png").exists()
    assert (tmp_path / "out/pruning.png").exists()
    assert "fisher" in capsys.readouterr().out
    wandb.teardown()
    logged = offline_run(tmp_path / "out")
    assert logged.config["arguments"]["criteria"] == "fisher"
    assert {"prunings", "pruning"} <= {key.split("/")[0] for item in logged.history for key in item}


MISTAKES = {
    "int8 network": ({"network": "net.safetensors"}, r"net\.safetensors is an int8 network: prune its \.ckpt in"),
    "int8 weights": ({"weights": "net.safetensors"}, r"net\.safetensors is an int8 network: .* and quantize after"),
    "no weights": ({"weights": "none"}, r"weights is none, and pruning needs a network that knows the data"),
    "another network": ({"network": "resnet"}, r"network is 'resnet': give mobilenet_v2"),
    "criterion": ({"criteria": "magnitude,size"}, r"criterion 'size' is unknown: give some of contribution, "),
    "no criterion": ({"criteria": ","}, r"criteria names none: give some of contribution,magnitude"),
    "sparsity 0": ({"sparsities": "0,0.5"}, r"sparsities is '0,0\.5': give parts above 0 and below 1"),
    "sparsity 1": ({"sparsities": "1"}, r"sparsities is '1': give parts above 0"),
    "no sparsity": ({"sparsities": ""}, r"sparsities is '': give parts above 0"),
    "sparsity x": ({"sparsities": "x"}, r"'x' is no list of numbers"),
    "sparsity too high": (
        {"sparsities": "0.999"},
        r"sparsity 0\.999 would leave a layer without 1 channels: give at m",
    ),
    "steps": ({"fine_tuning_steps": -1}, r"fine_tuning_steps is -1: give 0 or more"),
    "units": ({"single_units": -1}, r"single_units is -1: give 0 or more"),
    "seeds": ({"seeds": 0}, r"seeds is 0: give 1 or more"),
    "samples": ({"choice_samples": 0}, r"choice_samples is 0: give 1 or more"),
    "unit samples": ({"single_unit_samples": 0}, r"single_unit_samples is 0: give 1 or more"),
    "multiple": ({"channel_multiple": 0}, r"channel_multiple is 0: give 1 or more"),
    "rate": ({"learning_rate": -1.0}, r"learning_rate is -1\.0: give 0 or more"),
    "other classes": (
        {"data_options": {"classes": (0, 1)}},
        r"2 classes of 32 features are wanted: give weights trained on these classes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(arguments, tmp_path, mistake):
    changed, text = MISTAKES[mistake]
    with pytest.raises(UserError, match=text) as error:
        recipe.main(**arguments | {"single_units": 0} | changed, out_dir=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


READERS = {
    "pruning.csv": lambda folder: prune_all(None, CRITERIA, [0.1], 1, 1, FineTuning(0, 1, 0.1), folder),
    "single_units.csv": lambda folder: removed_alone(None, CRITERIA, UNITS, None, folder),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"criterion\n1\n", b"\xff\xfe", b"group,kind,channel\na,b,c\n"])
def test_damaged_tables_are_told(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*, or remove the file to measure anew$"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("data", ["cifar10", "speech_commands"])
def test_committed_tables_are_what_the_recipe_writes(tmp_path, data):
    criteria = recipe.CRITERIA.split(",")
    for name, row_type in {f"{data}.csv": PrunedRow, f"{data}_single_units.csv": single_unit_type(*criteria)}.items():
        committed = COMMITTED / name
        write_rows(tmp_path / name, read_rows(committed, row_type), row_type)
        assert (tmp_path / name).read_bytes() == committed.read_bytes()


def test_data_without_a_validation_split_are_refused(arguments, tmp_path, monkeypatch):
    class WithoutValidation(Digits):
        def setup(self, stage=None):
            super().setup(stage)
            self.val_samples = 0

    monkeypatch.setattr(DataSet, "module_class", lambda _: WithoutValidation)
    with pytest.raises(UserError, match=r"judged on the validation split: leave validation_fraction 0 out"):
        recipe.main(**arguments, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def group_of(name, channels):
    return ChannelGroup(name, channels, (name,), (), ())


def test_units_are_shared_out_evenly():
    groups = [group_of("a", 2), group_of("b", 50), group_of("c", 50)]
    drawn = chosen_units(groups, 22, seed=0)
    assert sorted(group.name for group, _ in drawn) == ["a"] * 2 + ["b"] * 10 + ["c"] * 10
    assert len({(group.name, channel) for group, channel in drawn}) == 22
    assert drawn == chosen_units(groups, 22, seed=0) != chosen_units(groups, 22, seed=1)
    assert len(chosen_units(groups, 1000, seed=0)) == 102
    assert all(0 <= channel < group.channels for group, channel in chosen_units(groups, 1000, seed=0))


class Batches:
    """Ten validation samples in batches of four."""

    samples = {"val": 10}  # noqa: RUF012

    def evaluation_batches(self, split):
        samples = torch.arange(10.0).view(10, 1, 1, 1)
        return zip(samples.split(4), torch.arange(10).split(4), strict=True)


@pytest.mark.parametrize(("count", "expected"), [(None, range(10)), (99, range(10)), (4, (0, 3, 6, 9)), (1, (0,))])
def test_validation_samples_are_evenly_spread(count, expected):
    batches = validation_features(Batches(), nn.Identity(), count)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(expected)
    assert torch.cat([samples for samples, _ in batches]).flatten().tolist() == list(expected)


def test_latency_of_more_work_is_longer():
    small, large = nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 64, 5), nn.Conv2d(64, 64, 5))
    milliseconds, ratio = latency(large, small, SHAPE, samples=2, passes=3)
    assert milliseconds > 0
    assert ratio > 2  # a hundred times the work


def made_up(scores_of, kind="expanded"):
    """Thirty units whose loss increases with their number, and scores by the number."""
    unit_type = single_unit_type(*scores_of)
    return [
        unit_type("a", kind, number, 0.1 * number, 0.01 * (number // 2), *(f(number) for f in scores_of.values()))
        for number in range(30)
    ]


def report_of(units, criteria):
    return {"criteria": criteria, "correlations": correlations(units, criteria), "prunings": []}


def test_the_verdict_is_by_the_rule():
    orders = {
        "contribution": lambda n: n,
        "magnitude": lambda n: -n,
        "random": lambda n: (n * 7) % 30,
        "taylor": lambda n: n,
    }
    shuffled = spearmanr(range(30), [(n * 7) % 30 for n in range(30)]).statistic
    assert -0.3 < shuffled < 0.3
    forward = report_of(made_up(orders), ["contribution", "magnitude", "random", "taylor"])
    assert verdicts(forward) == [
        "contribution ranks the loss increase of removing single units with rho = 1.00 (1.00 to 1.00) over 30 "
        f"{kind}units: it describes what inference can do without (better than magnitude with -1.00; better than "
        f"random with {shuffled:.2f}; not to be told from taylor with 1.00)"
        for kind in ("", "expanded ")
    ]
    backward = verdicts(report_of(made_up(orders), ["magnitude", "contribution"]))
    assert "it describes the opposite of what inference can do without" in backward[0]
    assert "worse than contribution with 1.00" in backward[0]
    assert "it does not describe what" in verdicts(report_of(made_up(orders), ["random", "magnitude"]))[0]


def test_scores_that_are_all_equal_have_no_rank():
    units = made_up({"contribution": lambda n: n, "magnitude": lambda n: 1.0})
    report = report_of(units, ["contribution", "magnitude"])
    entry = report["correlations"][1]
    assert (entry["rho"], entry["interval"], entry["difference"]) == (None, None, None)
    assert "magnitude has no ranks" in verdicts(report)[0]
    json.dumps(report, allow_nan=False)
    assert verdicts(report_of(units, ["magnitude", "contribution"])) == []


def pruned(criterion, seed, fine_tuned, top1, sparsity=0.3):
    return PrunedRow(criterion, sparsity, seed, fine_tuned, top1, top1, 1000, 100, 100, 100, 1.0, 1.0, 1.0)


def test_differences_of_prunings_are_paired_over_seeds():
    rows = [
        pruned("contribution", 0, False, 0.8),
        *(pruned("random", seed, False, 0.4 + 0.1 * seed) for seed in range(3)),
    ]
    rows += [pruned("contribution", seed, True, 0.8 + 0.02 * seed) for seed in range(3)]
    rows += [pruned("random", seed, True, 0.7 + 0.02 * seed) for seed in range(3)]
    entries = {(one["criterion"], one["fine_tuned"]): one for one in curves(rows, ["contribution", "random"])}
    assert "difference" not in entries["contribution", False]
    assert entries["random", False]["difference"] == pytest.approx(0.3)
    assert entries["random", False]["interval"] is None
    assert entries["random", True]["difference"] == pytest.approx(0.1)
    assert entries["random", True]["interval"] == pytest.approx((0.1, 0.1))
    report = {"criteria": ["contribution", "random"], "correlations": [], "prunings": list(entries.values())}
    assert verdicts(report) == [
        "pruned by contribution, the top-1 without fine-tuning differs from random's by +30.0 at 0.3 points",
        "pruned by contribution, the top-1 after fine-tuning differs from random's by +10.0 (+10.0 to +10.0) at 0.3 "
        "points",
    ]
    # an equal one has a difference too
    equal = curves([pruned("contribution", 0, False, 0.5), pruned("random", 0, False, 0.5)], ["contribution", "random"])
    assert [entry.get("difference") for entry in equal] == [None, 0.0]
    assert len(astuple(rows[0])) == len(PrunedRow.__dataclass_fields__)
