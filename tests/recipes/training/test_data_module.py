"""Data modules by name: set up, normalised as the weights want it, and with their own options."""

import inspect

import pytest

from microtune.datamodules.data_sets import DATA_SETS
from microtune.datamodules.digits import Digits
from microtune.datamodules.image_folder import ImageFolder
from microtune.datamodules.keyword_audio import KeywordFrontEnd
from microtune.modules.int8.files import write_quantized_network
from microtune.modules.networks.pretrained_weights import NORMALIZATION
from microtune.modules.user_error import UserError
from microtune.recipes.training.data_module import DECIDED, data_module

FOLDERS = {
    "digits": None,
    "cifar10": "tiny_cifar",
    "cifar100": "tiny_cifar100",
    "image_folder": "tiny_images",
    "imagenet": "tiny_imagenet",
    "speech_commands": "tiny_speech_commands",
    "mswc": "tiny_mswc",
}
OPTIONS = {
    "image_folder": {"num_workers": 0},
    "imagenet": {"num_workers": 0},
    "speech_commands": {"task": "words10"},
    "mswc": {"languages": ["ar"]},
}


@pytest.fixture
def make(request):
    """Makes the data module of a name from the small made-up data."""

    def call(name, weights="none", resolution=32, batch_size=16, seed=0, **options):
        data_dir = FOLDERS[name] and request.getfixturevalue(FOLDERS[name])
        return data_module(name, data_dir, weights, resolution, batch_size, seed, OPTIONS.get(name, {}) | options)

    return call


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_is_ready(name, make):
    data = make(name, batch_size=8, seed=3)
    assert type(data) is DATA_SETS[name].module_class()
    assert (data.batch_size, data.seed) == (8, 3)
    samples, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert samples.shape == (8, *data.input_shape)


@pytest.mark.parametrize(
    ("weights", "padding"), [("none", "symmetric"), ("torchvision", "symmetric"), ("x.h5", "keras")]
)
@pytest.mark.parametrize("name", DATA_SETS)
def test_photographs_are_normalised_as_the_weights_want_it(name, weights, padding, make):
    data = make(name, weights)
    if DATA_SETS[name].image_channels is None:
        assert isinstance(data.front_end, KeywordFrontEnd)
    elif name == "digits":
        assert data.normalization == Digits().normalization
    else:
        assert data.normalization == NORMALIZATION[padding]


def test_digits_are_augmented_unless_asked_otherwise(make):
    assert make("digits").augment
    assert not make("digits", augment=False).augment


def test_resolution_is_that_of_images(make):
    assert make("digits", resolution=48).input_shape == (1, 48, 48)
    assert make("image_folder", resolution=40).input_shape == (3, 40, 40)
    assert make("mswc", resolution=40).input_shape == (1, 97, 40)


def test_options_reach_the_data_module(make):
    assert make("mswc", n_mels=20, hop_ms=20).input_shape == (1, 49, 20)
    data = make("digits", classes=[7, 3])  # a list, as YAML gives it
    assert (data.classes, data.class_names) == ((7, 3), ["7", "3"])
    assert make("image_folder", smallest_crop=0.5).smallest_crop == 0.5


def test_the_classes_of_cifar_follow_from_the_name(make, tiny_cifar):
    assert make("cifar10").num_classes == 10
    assert make("cifar100").num_classes == 100
    with pytest.raises(UserError, match="cifar-100"):
        data_module("cifar100", tiny_cifar, "none", 32, 16, 0)


@pytest.mark.parametrize("name", ["mnist", "CIFAR10", ""])
def test_unknown_data_is_refused(name):
    with pytest.raises(UserError) as refused:
        data_module(name, "data", "none", 32, 16, 0)
    assert str(refused.value) == (
        f"data is {name!r}: give one of digits, cifar10, cifar100, image_folder, imagenet, speech_commands, mswc"
    )


@pytest.mark.parametrize("name", [name for name, folder in FOLDERS.items() if folder])
def test_a_missing_data_dir_is_refused(name):
    with pytest.raises(UserError, match=f"^{name} lies in a folder: give it with --data_dir$"):
        data_module(name, None, "none", 32, 16, 0)


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("option", ["colour", *sorted(DECIDED)])
def test_unknown_options_and_those_of_the_recipe_are_refused(option, name):
    with pytest.raises(UserError, match=rf"^{name} has no option '{option}': give one of \w+(, \w+)*$") as refused:
        data_module(name, "nowhere", "none", 32, 16, 0, {option: 1})
    known = str(refused.value).rpartition("one of ")[2].split(", ")
    taken = set(inspect.signature(DATA_SETS[name].module_class().__init__).parameters)
    assert set(known) == taken - {*DECIDED} - ({"classes"} if name.startswith("cifar") else set())


def test_what_the_data_module_refuses(make):
    with pytest.raises(UserError, match="batch_size 0 is not positive"):
        make("digits", batch_size=0)
    with pytest.raises(UserError, match="there is no task 'words13'"):
        make("speech_commands", task="words13")
    with pytest.raises(UserError, match="no such folder is not a folder"):
        data_module("image_folder", "no such folder", "none", 32, 16, 0)


def test_options_are_left_as_they_were(make):
    options = {"classes": [1, 2]}
    data_module("digits", None, "none", 32, 16, 0, options)
    assert options == {"classes": [1, 2]}


def test_arguments_of_image_folder_that_it_needs_are_given(make):
    """The data modules' own defaults of what the recipe decides do not count."""
    data = make("image_folder", batch_size=4, seed=9, resolution=64)
    default = inspect.signature(ImageFolder.__init__).parameters
    for name in ("batch_size", "seed", "resolution"):
        assert getattr(data, name) != default[name].default


def test_digits_go_by_an_int8_network_of_grey_images_only(small_graph, small_tensors, tmp_path):
    """Of one for colours it is said elsewhere that it takes other channels, and not that its normalization is wrong."""
    write_quantized_network(tmp_path / "colours.safetensors", small_graph, small_tensors)
    data = data_module("digits", None, str(tmp_path / "colours.safetensors"), 32, 16, 0)
    assert data.normalization == ((0.5,), (0.5,))
