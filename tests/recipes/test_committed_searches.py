"""The measurements and schemes that come with the package: what the recipes make, and for everyone."""

import hashlib
import importlib
import json
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS, microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes, flash_bytes
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.contribution_trials import (
    contributions_of,
    read_trials,
    updates_to_measure,
    write_trials,
)
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.plan import plan_measurement
from microtune.recipes.search.shared_folder import CLAIMS
from microtune.recipes.studies.benchmark_search import settings_of_measurement
from microtune.recipes.training.command_line import parse, parser_of
from microtune.recipes.training.networks import DescribedNetwork, describe_network

ROOT = Path(__file__).parents[2]
MEASUREMENTS = sorted(path.parent for path in (ROOT / "recipes/contributions").glob("*/contributions.csv"))
OF_THE_PAPER = [  # not searched for
    ROOT / f"recipes/schemes/mobilenet_v2-w0.35_{name}.json"
    for name in ("all_biases", "last_12_layers", "lin2022_73kb", "lin2022_99kb")
]
SCHEMES = sorted(path for path in (ROOT / "recipes/schemes").glob("*.json") if path not in OF_THE_PAPER)
INPUTS = {  # shape, classes and weights, which need not be there, of what the data sets' networks read
    "digits": ((1, 32, 32), 5, "none"),
    "cifar10": ((3, 96, 96), 10, "keras.npz"),
    "speech_commands": ((1, 97, 40), 10, "none"),
}
NETWORK = r"(?P<network>mobilenet_v2-w(?P<width>\d\.\d+)(?P<head>-head)?)"
SCHEME_NAME = re.compile(rf"{NETWORK}_(?P<data>{'|'.join(INPUTS)})_(?P<mcu>{'|'.join(MICROCONTROLLERS)})\.json")
# a slash, drive or home where a path begins, or a folder that only some machines have
ABSOLUTE_PATH = re.compile(
    r"""(?:^|[\s"'=:,(\[])(?:/\w|~/|[A-Za-z]:\\)|/(?:home|Users|root|tmp|work|mnt)/""", re.MULTILINE
)


@dataclass(frozen=True)
class Named:
    """What a file's name says."""

    network: str
    width: float
    head_convolution: bool
    data: str
    mcu: str = ""

    @classmethod
    def of(cls, found: re.Match) -> "Named":
        parts = found.groupdict()
        width, head = float(parts["width"]), parts["head"] is not None
        return cls(parts["network"], width, head, parts["data"], parts.get("mcu", ""))

    def described(self) -> DescribedNetwork:
        shape, classes, weights = INPUTS[self.data]
        return described_once(weights, shape, classes, self.width, self.head_convolution)


described_once = cache(describe_network)


def named_by(path: Path) -> Named:
    found = SCHEME_NAME.fullmatch(path.name)
    assert found, f"{path.name} is not <network>_<data set>_<mcu>.json"
    return Named.of(found)


def found_of(provenance: dict) -> dict:
    """What the search reports, which the quickstart writes beside the rest."""
    return provenance.get("found", provenance)


def understood(recipe: str, words: list[str]) -> dict:
    """The arguments, as the recipe's parser takes them."""
    main = importlib.import_module(f"microtune.recipes.{recipe}").main
    return parse(parser_of(main), words)


def test_measurements_were_found():
    assert {folder.name for folder in MEASUREMENTS} >= {
        "mobilenet_v2-w0.35_cifar10",
        "mobilenet_v2-w0.35_speech_commands",
    }


def test_padding_is_that_of_the_weights():
    """Else the networks of CIFAR-10 here would not be those of the commands."""
    paddings = {data: Named("any", 0.35, False, data).described().arguments["padding"] for data in INPUTS}
    assert paddings == {"digits": "symmetric", "cifar10": "keras", "speech_commands": "symmetric"}


def test_absolute_paths_are_recognised():
    for text in ("data_dir: /data", "--weights '/w/x.ckpt'", "a: ~/data", "C:\\data", "b=/x", "../home/me/data"):
        assert ABSOLUTE_PATH.search(text), text
    for text in ("data_dir: ../shared/data", "recipes/x.py --data data/cifar", "kind,bias_depth", "1/2"):
        assert not ABSOLUTE_PATH.search(text), text


# ---- measurements


@pytest.fixture(params=MEASUREMENTS, ids=lambda folder: folder.name)
def measurement(request):
    return request.param


@pytest.fixture
def arguments(measurement):
    """As the recipe understands its own configuration."""
    return understood("measure_contributions", ["--config", str(measurement / "config.yaml")])


@pytest.fixture
def described(measurement):
    """The network that the folder's name says, on the data that it says."""
    found = re.fullmatch(rf"{NETWORK}_(?P<data>{'|'.join(INPUTS)})", measurement.name)
    assert found, f"{measurement.name} is not <network>_<data set>"
    return Named.of(found).described()


def test_configuration(measurement, arguments):
    text = (measurement / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text).keys() <= arguments.keys()
    assert arguments["out_dir"] is None
    assert arguments["features_dir"] is None
    assert measurement.name.endswith(f"_{arguments['data']}")
    settings = settings_of_measurement(measurement)  # as the benchmark of the search reads it
    assert vars(settings).items() <= arguments.items()


def test_measurement_names_no_machine(measurement):
    for path in (*measurement.glob("*.csv"), *measurement.glob("*.yaml")):
        assert not ABSOLUTE_PATH.search(path.read_text(encoding="utf-8")), path


def test_table_is_for_its_network(measurement, arguments, described):
    table = ContributionTable.load(measurement / "contributions.csv")
    assert table.base_depth == arguments["base_depth"]
    within = described.operations.convolutions[-table.base_depth :]
    table.check(described.operations.convolutions, [layer.name for layer in within if is_expanding(layer)])


@pytest.fixture
def updates(arguments, described):
    """What the configuration asks for."""
    settings = TrialSettings("digits", base_depth=arguments["base_depth"])
    asked = (arguments[name] for name in ("layers", "ratios", "bias_depths", "seeds", "side_by_side"))
    plan = plan_measurement(*asked, settings)
    return updates_to_measure(described, settings.base_depth, plan.layers, plan.ratios, plan.bias_depths)


def test_table_is_that_of_its_trials(measurement, arguments, updates):
    """All that the configuration asks for was trained, once each, and gives the table to the last bit."""
    trials, seeds = read_trials(measurement), arguments["seeds"]
    made = [(trial.update, trial.seed) for trial in trials]
    assert set(made) == {(update, seed) for update in updates for seed in range(seeds)}
    assert len(made) == len(set(made))
    assert all(0 <= trial.val_top1 <= 1 for trial in trials)
    rows = ContributionTable.load(measurement / "contributions.csv").rows
    assert rows == tuple(contributions_of(trials, updates, seeds))


def test_files_are_what_the_recipe_writes(measurement, arguments, updates, tmp_path):
    """Written anew, nothing changes."""
    (tmp_path / CLAIMS).mkdir()
    write_trials(tmp_path, read_trials(measurement), updates, arguments["seeds"])
    for name in ("contributions.csv", "trials.csv"):
        assert (tmp_path / name).read_bytes() == (measurement / name).read_bytes()


# ---- schemes


@pytest.fixture(params=SCHEMES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_name(path):
    named_by(path)


def test_scheme_is_for_its_network(path):
    scheme, named = UpdateScheme.load(path), named_by(path)
    assert scheme.network == named.network
    scheme.check(named.described().operations.convolutions, named.network)
    assert named.described().name == named.network


def test_scheme_fits_its_microcontroller(path):
    scheme, named = UpdateScheme.load(path), named_by(path)
    device, operations = microcontroller(named.mcu), named.described().operations
    peak_bytes = PeakMemory(operations).peak_bytes(scheme)
    assert peak_bytes <= device.budget_bytes
    assert flash_bytes(operations, scheme) <= device.flash_bytes
    provenance = scheme.provenance
    assert provenance["mcu"] == named.mcu
    assert provenance.get("memory", "peak") == "peak"
    assert provenance["budget_bytes"] == device.budget_bytes
    assert found_of(provenance).get("memory_bytes", peak_bytes) == peak_bytes


def test_provenance(path):
    """The command is one that its recipe understands, for this microcontroller."""
    provenance, named = UpdateScheme.load(path).provenance, named_by(path)
    program, run, script, *words = shlex.split(provenance["command"])
    assert (program, run) == ("uv", "run")
    assert (ROOT / script).is_file()
    arguments = understood(Path(script).stem, words)
    assert arguments["mcu"] == named.mcu
    assert arguments.get("data") in (named.data, None)


def test_scheme_is_as_good_as_it_says(path):
    """The table of the command is the one here, and by it the scheme has the score of the provenance."""
    scheme = UpdateScheme.load(path)
    found, words = found_of(scheme.provenance), shlex.split(scheme.provenance["command"])
    assert 0 < found["score"] <= found["optimum_score"] + 1e-12
    if "--contributions" not in words:  # the recipe measures a table of its own
        return
    file = ROOT / words[words.index("--contributions") + 1]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == scheme.provenance["contributions_sha256"]
    table = ContributionTable.load(file)
    gains = [table.weight_gains[layer][ratio] for layer, ratio in scheme.weights.items()]
    assert found["score"] == pytest.approx(table.bias_gains[scheme.bias_depth] + sum(gains), rel=1e-9)


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=lambda path: path.stem)
def test_scheme_of_the_paper_takes_what_it_says(path):
    scheme = UpdateScheme.load(path)
    resolution = scheme.provenance["resolution"]
    described = described_once("none", (3, resolution, resolution), 10, 0.35)
    operations = described.operations
    scheme.check(operations.convolutions, described.name)
    taken = extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)
    assert taken == scheme.provenance["extra_memory_bytes"]


def test_scheme_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not ABSOLUTE_PATH.search(text)
    assert not ABSOLUTE_PATH.search(json.dumps(json.loads(text), indent=1))  # escapes undone
