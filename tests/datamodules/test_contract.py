"""Every data set of the list keeps the contract, and so does one that is added as the README says."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import microtune.datamodules
from microtune.datamodules.contract import ClassificationData
from microtune.datamodules.data_sets import DATA_SETS, DataSet
from microtune.modules.classifier import Classifier
from microtune.modules.int8.files import read_quantized_network
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.sparse_update.simple_schemes import classifier_only
from microtune.recipes import measure_contributions, quantize_network
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import described_by, trials

ROOT = Path(__file__).parents[2]
README = (ROOT / "datamodules/README.md").read_text(encoding="utf-8")
ADDED = "bars"
NAMES = [*DATA_SETS, ADDED]
# a fixture with a few made-up samples for each data set that lies in a folder
FOLDERS = {
    "cifar10": "tiny_cifar",
    "cifar100": "tiny_cifar100",
    "image_folder": "tiny_images",
    "imagenet": "tiny_imagenet",
    "speech_commands": "tiny_speech_commands",
    "mswc": "tiny_mswc",
}
# what these few samples, or a test that starts no processes, need
OPTIONS = {
    "image_folder": {"num_workers": 0},
    "imagenet": {"num_workers": 0},
    "speech_commands": {"task": "words10"},
    "mswc": {"languages": ["ar"]},
}
BATCH_SIZE, RESOLUTION = 8, 32


@pytest.fixture(scope="module", autouse=True)
def added(tmp_path_factory):
    """The data set of the README: its file among the data modules, its entry in the list, and nothing else."""
    code, entry = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    folder = tmp_path_factory.mktemp("datamodules")
    (folder / f"{ADDED}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microtune.datamodules, "__path__", [*microtune.datamodules.__path__, str(folder)])
        for name, data_set in eval(f"{{{entry}}}", {"DataSet": DataSet}).items():
            patch.setitem(DATA_SETS, name, data_set)
        yield
        sys.modules.pop(f"microtune.datamodules.{ADDED}", None)


@pytest.fixture(scope="module")
def make(request):
    """Makes a data module of the list, set up."""

    def call(name, **options):
        data_set = DATA_SETS[name]
        arguments = {"batch_size": BATCH_SIZE, "seed": 3, **data_set.arguments, **OPTIONS.get(name, {}), **options}
        if data_set.image_channels is not None:
            arguments["resolution"] = RESOLUTION
        if data_set.is_in_folder:
            arguments["data_dir"] = request.getfixturevalue(FOLDERS[name])
        data = data_set.module_class()(**arguments)
        data.prepare_data()
        data.setup()
        return data

    return call


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def data(name, make):
    return make(name)


def fetched(data, loader, keys):
    """Samples and labels as a network gets them."""
    one_batch = DataLoader(
        loader.dataset, batch_sampler=[keys], collate_fn=loader.collate_fn, generator=torch.Generator()
    )
    return data.on_after_batch_transfer(next(iter(one_batch)), 0)


def equal(batches, others):
    return all(torch.equal(one, other) for one, other in zip(batches, others, strict=True))


def test_the_list_says_what_the_constructor_takes(name):
    data_set = DATA_SETS[name]
    known = set(inspect.signature(data_set.module_class().__init__).parameters)
    assert {"batch_size", "seed"} <= known
    assert {"resolution", "normalization"} & known == (
        set() if data_set.image_channels is None else {"resolution", "normalization"}
    )
    assert ("data_dir" in known) == data_set.is_in_folder
    for some in (data_set.arguments, data_set.options, data_set.without_augmentation):
        assert some.keys() <= known
    if data_set.recipe is not None:
        assert (ROOT / "recipes" / shlex.split(data_set.recipe)[0]).is_file()


def test_titles_tell_data_sets_apart():
    assert len({data_set.title for data_set in DATA_SETS.values()}) == len(DATA_SETS)


def test_the_readme_names_every_data_set():
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)))
    assert listed == [name for name in DATA_SETS if name != ADDED]


def test_what_a_network_must_know(name, data):
    assert isinstance(data, ClassificationData)
    assert all(type(size) is int and size > 0 for size in data.input_shape)
    assert len(data.input_shape) == 3
    assert data.num_classes == len(data.class_names) == len(set(data.class_names)) > 1
    assert all(type(class_name) is str for class_name in data.class_names)
    channels = DATA_SETS[name].image_channels
    if channels is None:
        assert data.normalization is None
    else:
        assert data.input_shape == (channels, RESOLUTION, RESOLUTION)
        assert {len(values) for values in data.normalization} <= {1, channels}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches(data, split):
    loader = getattr(data, f"{split}_dataloader")()
    samples = getattr(data, f"{split}_samples")
    assert len(loader.dataset) == samples > 0
    found = []
    for batch in loader:
        given, labels = data.on_after_batch_transfer(batch, 0)
        assert given.shape == (len(labels), *data.input_shape)
        assert (given.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert given.isfinite().all()
        assert 0 <= labels.min() <= labels.max() < data.num_classes
        assert len(labels) <= BATCH_SIZE
        found.append(len(labels))
    # a batch of one sample, of which batch norm has no statistics, is left out in training
    assert samples - (split == "train") <= sum(found) <= samples


def test_order_follows_from_seed_and_epoch(name, data, make):
    def keys(data, epoch):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    first, second = keys(data, 1), keys(data, 2)
    assert sorted(first) == [(1, index) for index in range(data.train_samples)]
    assert [index for _, index in first] != [index for _, index in second]
    assert keys(make(name), 1) == first
    assert keys(make(name, seed=4), 1) != first
    assert list(data.val_dataloader().sampler) == list(range(data.val_samples))


def test_samples_follow_from_seed_epoch_and_index(name, make):
    """Whatever torch's global random numbers are, which stay as they are; another epoch or seed augments otherwise."""

    def samples(epoch, seed):
        data = make(name, **{**DATA_SETS[name].options, "seed": seed})
        torch.manual_seed(epoch)
        before = torch.get_rng_state()
        given, _ = fetched(data, data.train_dataloader(), [(epoch, index) for index in range(BATCH_SIZE)])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        again, _ = fetched(data, data.train_dataloader(), [(epoch, index) for index in range(BATCH_SIZE)])
        assert torch.equal(again, given)
        return given

    with torch.random.fork_rng(devices=[]):
        found = samples(epoch=5, seed=3)
        assert torch.equal(samples(epoch=5, seed=3), found)
        assert not torch.equal(samples(epoch=6, seed=3), found)
        assert not torch.equal(samples(epoch=5, seed=4), found)


def test_training_samples_can_be_shown_as_they_are(name, make):
    data = make(name, **DATA_SETS[name].without_augmentation)
    batches = [
        fetched(data, data.train_dataloader(), [(epoch, index) for index in range(BATCH_SIZE)]) for epoch in (0, 1)
    ]
    assert equal(*batches)


def test_evaluation_changes_nothing(data):
    for loader in (data.val_dataloader(), data.test_dataloader()):
        keys = list(range(min(BATCH_SIZE, len(loader.dataset))))
        assert equal(fetched(data, loader, keys), fetched(data, loader, keys))


def test_setup_does_its_work_once(data):
    before = data.train_dataloader().dataset
    data.setup("fit")
    data.setup("test")
    assert data.train_dataloader().dataset is before


def test_names_are_known_without_pytorch():
    script = """if True:
        import sys
        import microtune.datamodules.contract, microtune.datamodules.data_sets, microtune.datamodules.option_names
        print(sorted({"lightning", "numpy", "sklearn", "torch", "torchaudio", "torchvision"} & set(sys.modules)))
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


@pytest.fixture(scope="module")
def checkpoint(make, tmp_path_factory):
    """A small network that has learnt the added data set for a second."""
    data = make(ADDED, batch_size=32)
    network = {"width": 0.1, "num_classes": data.num_classes, "in_channels": 1, "folded": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Classifier(network, class_names=data.class_names, input_shape=list(data.input_shape))
        optimizer = torch.optim.AdamW(module.parameters(), 0.01)
        for batch in [*data.train_dataloader()] * 5:
            optimizer.zero_grad()
            samples, labels = data.on_after_batch_transfer(batch, 0)
            module.loss(module(samples), labels).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path


def test_trials_train_on_what_was_added(checkpoint):
    settings = TrialSettings(ADDED, weights=str(checkpoint), resolution=RESOLUTION, base_depth=4, steps=20)
    described = described_by(settings)
    assert described.input_shape == (1, RESOLUTION, RESOLUTION)
    (accuracy,) = trials(settings).accuracies([classifier_only(described.name)], seed=0)
    assert accuracy > 0.5  # of four classes


def test_contributions_are_measured_on_what_was_added(checkpoint, tmp_path):
    settings = TrialSettings(ADDED, weights=str(checkpoint), resolution=RESOLUTION, base_depth=4, steps=2)
    table = measure_contributions.main(
        ratios="1", bias_depths="2", seeds=1, logger="none", out_dir=tmp_path, settings=settings
    )
    assert table == ContributionTable.load(tmp_path / "contributions.csv")
    assert len(table.rows) > 1


def test_networks_are_quantized_by_what_was_added(checkpoint, tmp_path, capsys):
    out = tmp_path / "bars.safetensors"
    quantize_network.main(str(checkpoint), out, data=ADDED, samples=32)
    graph, _ = read_quantized_network(out)
    assert graph.class_names == ("noise", "rows", "columns", "grid")
    assert graph.normalization is not None
    assert "Top-1 on the validation split of 32 samples" in capsys.readouterr().out
    # and the int8 network takes the same data, normalised as it expects them
    settings = TrialSettings(ADDED, network=str(out), resolution=RESOLUTION, base_depth=4, steps=2)
    assert trials(settings).features.data.normalization == graph.normalization
