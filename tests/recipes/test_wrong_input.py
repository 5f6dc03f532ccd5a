"""Wrong input gets one clear line and exit status 2, and nothing is written, nor written over."""

import json
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from microtune.modules.networks.mobilenet_v2 import mobilenet_v2

NETWORK = "mobilenet_v2-w0.35"
EXPANSION, EARLY = "features.17.conv.0.0", "features.2.conv.0.0"
SCHEME = {"network": NETWORK, "bias_depth": 3, "weights": {EXPANSION: 0.5}}


@pytest.fixture
def cifar_words(tiny_run, as_words):
    """A run of ``train_cifar`` that would end well."""
    return as_words(tiny_run("train_cifar") | {"epochs": 1, "out_dir": "out"})


def test_the_run_without_a_mistake_ends_well(cifar_words, command, here):
    (here / "scheme.json").write_text(json.dumps(SCHEME))
    assert command("train_cifar", *cifar_words, "--scheme", "scheme.json").status == 0
    assert (here / "out/report.json").exists()


SCHEMES = {
    "unknown layer": ({"weights": {"features.99": 1.0}}, r"layer features\.99 is no convolution of the network"),
    "ratio 0": ({"weights": {EXPANSION: 0}}, rf"update ratio of {EXPANSION} is 0: give a number in \(0, 1\]"),
    "ratio above 1": ({"weights": {EXPANSION: 1.5}}, r"is 1\.5: give a number in \(0, 1\]"),
    "negative ratio": ({"weights": {EXPANSION: -0.5}}, r"is -0\.5: give a number in \(0, 1\]"),
    "ratio NaN": ({"weights": {EXPANSION: float("nan")}}, r"is nan: give a number in \(0, 1\]"),
    "ratio infinite": ({"weights": {EXPANSION: float("inf")}}, r"is inf: give a number in \(0, 1\]"),
    "ratio in words": ({"weights": {EXPANSION: "half"}}, r"is 'half': give a number in \(0, 1\]"),
    "ratio true": ({"weights": {EXPANSION: True}}, r"is True: give a number in \(0, 1\]"),
    "ratio of no channel": ({"weights": {EXPANSION: 0.001}}, "0.001 of .* is none of its 56 input channels: give at l"),
    "weights as a list": ({"weights": [EXPANSION]}, "weights is .*: give a mapping"),
    "outside the bias depth": ({"weights": {EARLY: 1.0}}, f"{EARLY} .* outside bias_depth 3: give at least 48"),
    "channel doubled": ({"channels": {EXPANSION: [1, 2, 1]}}, f"channel 1 of {EXPANSION} stands there twice"),
    "channel too high": ({"channels": {EXPANSION: [56]}}, "channel 56 of .* its input channels are 0 to 55"),
    "channel negative": ({"channels": {EXPANSION: [-1]}}, "channel -1 of .* is no channel index"),
    "channel a fraction": ({"channels": {EXPANSION: [0.5]}}, r"channel 0\.5 of .* is no channel index"),
    "no channels": ({"channels": {EXPANSION: []}}, "give a list of at least one channel index"),
    "channels without weight": ({"channels": {EARLY: [1]}}, f"channels of {EARLY} are fixed, but it is not among"),
    "unknown key": ({"bias": 3}, "unknown key 'bias': an update scheme has network, bias_depth, weights, channels"),
    "bias depth too large": ({"bias_depth": 52}, "bias_depth is 52, but the network has no more than 51"),
    "bias depth negative": ({"bias_depth": -1}, "bias_depth is -1: give"),
    "bias depth a fraction": ({"bias_depth": 2.5}, r"bias_depth is 2\.5: give"),
    "another network": ({"network": "resnet18"}, f"the scheme is for resnet18, but the network is {NETWORK}"),
    "another width": ({"network": "mobilenet_v2-w0.5"}, "the scheme is for mobilenet_v2-w0.5, but the network is"),
    "network no name": ({"network": 3}, "network is 3: give the network's name"),
}


@pytest.mark.parametrize("mistake", SCHEMES)
def test_scheme(mistake, refused, cifar_words, here):
    changes, message = SCHEMES[mistake]
    (here / "scheme.json").write_text(json.dumps(SCHEME | changes))
    line = refused(message, "train_cifar", *cifar_words, "--scheme", "scheme.json")
    assert "scheme.json: " in line


WHOLE = json.dumps(SCHEME, indent=2).encode()
FILES = {
    "truncated": (WHOLE[:-20], "not valid JSON, perhaps cut off"),
    "malformed": (b"bias_depth: 3", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "binary": (bytes(range(256)), "this is a binary file, not an update scheme in JSON"),
    "a list": (b"[1, 2]", "an update scheme is a JSON object with the keys"),
    "a key twice": (WHOLE[:-2] + b', "bias_depth": 4}', "key 'bias_depth' stands there twice"),
    "a key missing": (b'{"network": "x", "weights": {}}', "key 'bias_depth' is missing"),
    "nested deeply": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("recipe", ["train_cifar", "report_memory", "benchmark_step"])
@pytest.mark.parametrize("kind", FILES)
def test_scheme_file(kind, recipe, refused, cifar_words, here):
    content, message = FILES[kind]
    (here / "scheme.json").write_bytes(content)
    words = {
        "train_cifar": cifar_words,
        "report_memory": ["--mcu", "stm32f746", "--resolution", "32"],
        "benchmark_step": ["--resolution", "32"],
    }[recipe]
    line = refused(f"scheme.json: .*{message}", recipe, *words, "--scheme", "scheme.json")
    assert len(line) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.json", "nowhere.json: cannot read the update scheme: No such file"),
        (
            "smallest",
            "unknown scheme 'smallest': give a JSON file or one of classifier, biases, last_layers, sub_tensor",
        ),
        ("./", "cannot read the update scheme: Is a directory"),
    ],
)
def test_scheme_that_is_not_there(name, message, refused, cifar_words):
    refused(message, "train_cifar", *cifar_words, "--scheme", name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--mcu", "stm32f747"],
            r"unknown microcontroller 'stm32f747' \(did you mean stm32f746\?\): known are stm32f746",
        ),
        (["--mcu", "pdp11"], "unknown microcontroller 'pdp11': known are .*; describe any other by sram_bytes"),
        (["--sram_bytes", "1000"], "reserve_bytes of custom is 32768, but its SRAM has 1000 bytes"),
        (
            ["--mcu", "stm32f746", "--sram_bytes", "1000"],
            "reserve_bytes of stm32f746 is 32768, but its SRAM has 1000 bytes",
        ),
        (["--sram_bytes", "-1"], "sram_bytes of custom is -1: give a positive number"),
        (["--flash_bytes", "0"], "flash_bytes of stm32f746 is 0: give a positive number"),
        (["--reserve_bytes", "-5"], "reserve_bytes of stm32f746 is -5: give 0 or more"),
    ],
)
def test_microcontroller(words, message, refused, cifar_words):
    refused(message, "train_cifar", *cifar_words, *words)
    named = [] if words[0] in ("--mcu", "--sram_bytes") else ["--mcu", "stm32f746"]
    refused(message, "report_memory", *named, *words, "--scheme", "full")


def test_no_microcontroller(refused):
    refused("no microcontroller: give sram_bytes or one of the names", "report_memory", "--scheme", "full")


def test_budget_below_the_smallest_scheme(refused, cifar_words):
    words = ["--resolution", "96", "--sram_bytes", "131072"]
    for scheme in ("sub_tensor", "classifier", "full"):
        line = refused("one training step needs", "train_cifar", *cifar_words, *words, "--scheme", scheme)
        assert "custom has 96.0 KiB (128.0 KiB less a reserve of 32.0 KiB)" in line
        assert (
            "even the classifier alone needs 130.4 KiB at 96 px; "
            "the largest resolution that fits, in steps of 16, is 80 px" in line
        )
        assert "--allow_oversize" in line


def test_budget_below_any_resolution(refused, cifar_words):
    words = ["--sram_bytes", "40000", "--scheme", "classifier"]
    refused("no smaller resolution would do: take a narrower network", "train_cifar", *cifar_words, *words)


def write_weights(folder):
    torch.save(mobilenet_v2(0.5).state_dict(), folder / "wider.pth")
    torch.save({"state_dict": {}, "hyper_parameters": {"network": {"padding": "symmetric"}}}, folder / "empty.ckpt")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    np.savez(folder / "other.npz", weights=np.zeros(3))
    (folder / "cut.pth").write_bytes((folder / "wider.pth").read_bytes()[:5000])
    (folder / "text.h5").write_text("no weights")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("wider.pth", r"is \(16, 96, 1, 1\) in weights wider\.pth and \(8, 96|give weights of this width"),
        ("cut.pth", r"weights file cut\.pth cannot be read .*: it is cut short"),
        ("text.h5", r"weights file text\.h5 cannot be read"),
        ("other.npz", r"weights file other\.npz has no array Conv1/kernel"),
        ("empty.ckpt", r"weights file empty\.ckpt has no tensor net\.features\.0\.0\.weight"),
        ("foreign.ckpt", r"checkpoint foreign\.ckpt says padding None"),
        ("nowhere.npz", r"weights file nowhere\.npz does not exist: give none, torchvision, or a \.pth"),
        ("imagenet", r"weights 'imagenet' are unknown: give none, torchvision, or a \.pth"),
    ],
)
def test_weights(file, message, refused, cifar_words, here):
    write_weights(here)
    refused(message, "train_cifar", *cifar_words, "--width", "0.35", "--weights", file)


def test_real_weights_of_another_width(shared_data, refused, cifar_words):
    weights = shared_data / "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"
    message = r"features\.\S+ is \(.*\) in weights .*npz and \(.*\) in the network: give weights of this width"
    refused(message, "train_cifar", *cifar_words, "--width", "0.5", "--weights", weights)


def test_missing_cifar_says_how_to_get_it(refused, cifar_words):
    line = refused(
        r"nowhere/cifar-10-batches-py does not exist: give --download true .*or unpack https://\S+cifar-10-python\.tar\.gz",
        *("train_cifar", *cifar_words, "--data_dir", "nowhere"),
    )
    assert "in nowhere" in line


def test_cifar_with_wrong_contents(refused, cifar_words, tiny_cifar, here):
    shutil.copytree(tiny_cifar, here / "data")
    (here / "data/cifar-10-batches-py/data_batch_3").write_bytes(b"no pickle")
    message = r"data_batch_3 is not a CIFAR file \(.*\): delete data/cifar-10-batches-py and give --download true"
    refused(message, "train_cifar", *cifar_words, "--data_dir", "data")
    (here / "data/cifar-10-batches-py/data_batch_3").unlink()
    refused("data_batch_3 is missing", "train_cifar", *cifar_words, "--data_dir", "data")


@pytest.fixture
def folder_words(tiny_run, as_words):
    return as_words(tiny_run("train_image_folder") | {"epochs": 1, "out_dir": "out"})


def test_missing_image_folder(refused, folder_words):
    message = r"nowhere is not a folder: give one with a folder per class with its images, or train/ and test/"
    refused(message, "train_image_folder", *folder_words, "--data_dir", "nowhere")
    refused("data_dir", "train_image_folder", "--epochs", "1")


def test_image_folder_with_something_else(refused, folder_words, tiny_images, here):
    shutil.copytree(tiny_images, here / "pictures")
    (here / "pictures/red/notes.txt").write_text("not a picture")
    words = [*folder_words, "--data_dir", "pictures"]
    refused(
        r"pictures/red/notes\.txt is not an image file: remove it or give --skip_broken", "train_image_folder", *words
    )
    (here / "pictures/red/notes.txt").rename(here / "pictures/notes.txt")
    (here / "pictures/empty").mkdir()
    refused(r"class folder pictures/empty has 0 images", "train_image_folder", *words)


def test_broken_image_is_one_line_too(command, folder_words, tiny_images, here):
    """It is found only when its turn comes, so that the run's folder is there by then."""
    shutil.copytree(tiny_images, here / "pictures")
    for path in (here / "pictures/red").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    ended = command("train_image_folder", *folder_words, "--data_dir", "pictures")
    assert ended.status == 2
    last = ended.errors.splitlines()[-1]
    assert re.search(r"pictures/red/\d\d\.png cannot be read as an image .*--skip_broken", last)
    assert "Traceback" not in ended.errors
    for path in (here / "pictures/red").iterdir():
        Image.new("RGB", (30, 30)).save(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "epochs is 0: give 1 or more"),
        (["--epochs", "-1"], "epochs is -1: give 1 or more"),
        (["--batch_size", "0"], "batch_size 0 is not positive"),
        (["--accumulate_batches", "0"], "accumulate_batches is 0: give 1 or more"),
        (["--num_workers", "-1"], "num_workers is -1: give 0 or more"),
        (["--seed", "-1"], "seed is -1: give 0 or more"),
        (["--learning_rate", "-0.1"], r"learning_rate is -0\.1: give 0 or more"),
        (["--momentum", "1.5"], r"momentum is 1\.5: give 0 or more, at most 1"),
        (["--weight_decay", "-1"], r"weight_decay is -1\.0: give 0 or more"),
        (["--label_smoothing", "2"], "label_smoothing is 2.0: give 0 or more, at most 1"),
        (["--warmup_fraction", "-0.1"], r"warmup_fraction is -0\.1: give 0 or more, at most 1"),
        (["--gradient_clip_norm", "-1"], r"gradient_clip_norm is -1\.0: give 0 or more"),
        (["--resolution", "0"], "resolution 0 is not positive"),
        (["--width", "0"], "width 0.0 is not in"),
        (["--learning_rate", "abc"], "learning_rate is abc: give a number"),
        (["--method", "best"], "method is best: give one of 'sub_tensor', 'mask'"),
        (["--epochs", "many"], "epochs is many: give a whole number"),
        (["--epochs", "1.5"], "epochs is 1.5: give a whole number"),
        (["--learning_rate", "nan"], "learning_rate.* nan"),
        (["--width", "nan"], "width is nan: give a number"),
        (["--optimizer", "lion"], "optimizer.*lion"),
        (["--classes", "20"], "classes is 20: give one of 10, 100"),
        (["--augmentation", "flip"], "augmentation is flip: give one of 'none', 'shift', 'crop'"),
        (["--validation_fraction", "1"], r"a held-out fraction of 1\.0 splits nothing: give one such as 0\.1"),
        (["--validation_fraction", "-0.1"], r"a held-out fraction of -0\.1 splits nothing"),
        (["--allow_oversize", "maybe"], "allow_oversize.*maybe"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--mcu.reserve_bytes", "3"], "mcu.*reserve_bytes"),
        (["stray"], "unrecognized arguments: stray"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--config", "nowhere.yaml"], "config.*File does not exist"),
        (["--resume"], "there is no run in out: start it without --resume"),
    ],
)
def test_argument(words, message, refused, cifar_words):
    refused(message, "train_cifar", *cifar_words, *words)


def test_resume_needs_a_folder(refused, tiny_run, as_words):
    refused(
        "--resume goes on with the run in a folder: give it with --out_dir",
        *("train_cifar", *as_words(tiny_run("train_cifar")), "--resume"),
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("accelerator", "abacus", "invalid accelerator name"),
        ("devices", "0", "not a valid input using cpu accelerator"),
        ("strategy", "luck", "invalid strategy name"),
        ("precision", "3", "Precision '3' is invalid"),
    ],
)
def test_what_lightning_refuses(option, value, message, command, cifar_words, here):
    ended = command("train_cifar", *cifar_words, f"--{option}", value)
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.count("\n") == 1
    assert message in ended.errors
    assert not (here / "out").exists()  # so that the same command, corrected, can run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: 1\nepoch: 3\n", "Option 'epoch' is not accepted"),
        (b"epochs: [1\n", "Problems parsing config"),
        (b"epochs: many\n", "epochs.*many"),
        (bytes(range(128, 256)), "the file of --config is binary"),
    ],
)
def test_configuration_file(content, message, refused, cifar_words, here):
    (here / "config.yaml").write_bytes(content)
    refused(message, "train_cifar", "--config", "config.yaml", *cifar_words)


def test_folder_that_is_a_file_or_cannot_be_made(refused, cifar_words, here):
    (here / "file").write_text("mine")
    refused("file cannot be a run's folder", "train_cifar", *cifar_words, "--out_dir", "file")
    refused("cannot be a run's folder", "train_cifar", *cifar_words, "--out_dir", "file/run")
    refused("cannot be a run's folder", "train_cifar", *cifar_words, "--out_dir", "/proc/run")


def test_diverged_run_says_so(command, cifar_words, here):
    ended = command("train_cifar", *cifar_words, "--learning_rate", "1e30", "--epochs", "2")
    assert ended.status == 2
    assert "training diverged" in ended.errors.splitlines()[-1]
    assert not (here / "out/report.json").exists()


def test_other_recipes(refused, scheme_file, here):
    refused("unknown microcontroller 'pdp11'", "quickstart", "--mcu", "pdp11", "--out_dir", "out")
    refused("seeds is 0: give 1 or more", "quickstart", "--seeds", "0", "--out_dir", "out")
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("mine")
    refused("mine is not empty", "quickstart", "--out_dir", "mine")
    words = ["--scheme", scheme_file, "--resolution", "32"]
    refused("rounds is 0: give 1 or more", "benchmark_step", *words, "--rounds", "0")
    refused("batch_size is 0: give 1 or more", "benchmark_step", *words, "--batch_size", "0")
    refused("threads is 0: give 1 or more", "benchmark_step", *words, "--threads", "0")
    refused("resolution is 0: give 1 or more", "benchmark_step", "--scheme", scheme_file, "--resolution", "0")
    refused(
        "resolution is -8: give 1 or more", "report_memory", "--scheme", "full", "--mcu", "rp2040", "--resolution", "-8"
    )
    refused(
        "optimizer_state.*lion", "report_memory", "--scheme", "full", "--mcu", "rp2040", "--optimizer_state", "lion"
    )
    refused("gradient_bytes is 0", "report_memory", "--scheme", "full", "--mcu", "rp2040", "--gradient_bytes", "0")


def test_exit_status_of_the_process(process, tmp_path):
    """One line on standard error, nothing on standard output: also seen from outside."""
    ended = process("train_cifar", "--scheme", "smallest", "--out_dir", tmp_path / "out")
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.startswith("train_cifar.py: error: unknown scheme 'smallest': ")
    assert ended.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_saved_configuration_is_yaml_of_plain_values(cifar_words, command, here):
    command("train_cifar", *cifar_words)
    values = yaml.safe_load((here / "out/config.yaml").read_text())
    assert all(value is None or isinstance(value, bool | int | float | str) for value in values.values())


# ---- speech
# Those that fail on an empty line: rich's Progress prints one to a standard error that is no terminal.


@pytest.fixture
def speech_words(tiny_run, as_words):
    """A run of ``train_speech_commands`` that would end well."""
    return as_words(tiny_run("train_speech_commands") | {"epochs": 1, "out_dir": "out"})


@pytest.fixture
def mswc_words(tiny_run, as_words):
    """A run of ``train_mswc`` that would end well."""
    return as_words(tiny_run("train_mswc") | {"epochs": 1, "out_dir": "out"})


@pytest.fixture
def imagenet_words(tiny_run, as_words):
    """A run of ``train_imagenet`` that would end well."""
    return as_words(tiny_run("train_imagenet") | {"epochs": 1, "out_dir": "out"})


@pytest.fixture
def own_speech(tiny_speech_commands, here):
    """The folder of a copy of the tiny Speech Commands, to spoil, in ``data``."""
    shutil.copytree(tiny_speech_commands, here / "data")
    return here / "data/SpeechCommands/speech_commands_v0.02"


@pytest.fixture
def own_mswc(tiny_mswc, here):
    """The folder of the Arabic of a copy of the tiny MSWC, to spoil, in ``data``."""
    shutil.copytree(tiny_mswc, here / "data")
    return here / "data/ar"


@pytest.fixture
def own_imagenet(tiny_imagenet, here):
    """A copy of the tiny ImageNet, to spoil, in ``data``."""
    return shutil.copytree(tiny_imagenet, here / "data")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data_dir", "nowhere"],
            r"nowhere/SpeechCommands/speech_commands_v0.02 does not exist: give --download true .*or unpack",
        ),
        (["--version", "1"], "speech_commands_v0.01 does not exist: give --download true"),
        (["--version", "3"], "version is 3: give one of 1, 2"),
        (["--task", "words99"], "task is words99: give one of 'words10', 'words12', 'all'"),
        (["--cache", "tape"], "cache is tape: give one of 'memory', 'disk'"),
        (["--n_mels", "4"], "n_mels is 4: give 8 to 80"),
        (["--hop_ms", "500"], "hop_ms is 500: give 5 to 100"),
        (["--batch_size", "0"], "batch_size 0 is not positive"),
        (["--resolution", "32"], "resolution"),
        (["--weights", "nowhere.ckpt"], r"weights file nowhere\.ckpt does not exist"),
        (["--sram_bytes", "40000"], "take a smaller input or a narrower network; or give --allow_oversize"),
    ],
)
def test_speech_commands(words, message, refused, speech_words):
    refused(message, "train_speech_commands", *speech_words, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_dir", "nowhere"], "nowhere/ar does not exist: get the audio and the splits of 'ar' at https://"),
        (["--languages", "fr"], "fr does not exist: get the audio and the splits of 'fr'"),
        (["--languages", ","], r"languages is \[\]: give one code or several"),
        (["--languages", "ar,ar"], r"languages is \['ar', 'ar'\]: give one code or several, each once"),
        (["--words", "bed,cat"], "the word 'bed' is not in the splits of ar: the nearest are "),
        (["--languages", "en", "--words", "bed,cta"], "the word 'cta' is not in the splits of en: the nearest are cat"),
        (["--languages", "en", "--words", "bed,bed"], "the word 'bed' is given twice: give each once"),
        (["--languages", "en", "--words", "bed"], "classes: 1, but a classifier needs two: choose more words, or give"),
        (["--languages", "en", "--words", "bed,cat", "--num_words", "2"], "words and num_words are two ways to choose"),
        (["--num_words", "4"], "num_words is 4, but only 3 words have training and test clips"),
        (["--num_words", "0"], "num_words is 0: give 1 or more"),
        (["--shots", "0"], "shots is 0: give 1 or more"),
        (["--unknown"], "all words are chosen, none is left for the class of unknown words: choose fewer"),
        (["--noise_dir", "nowhere"], "noise_dir nowhere is not a folder: give one with WAV files, or none"),
        (["--splits_dir", "nowhere"], "splits_dir nowhere is not a folder: give that of the csv files"),
        (["--archives", "nowhere.tar.gz"], r"nowhere\.tar\.gz does not exist: give a \.tar or \.tar\.gz file"),
        (["--cache", "tape"], "cache is tape: give one of 'memory', 'disk'"),
        (["--n_mels", "81"], "n_mels is 81: give 8 to 80"),
        (["--evaluate_only"], "evaluate_only tests weights: give them with --weights"),
    ],
)
def test_mswc(words, message, refused, mswc_words):
    refused(message, "train_mswc", *mswc_words, *words)


def test_earlier_weights_of_other_spectrograms(refused, mswc_words, speech_words, finished_runs):
    for learnt in ("train_mswc", "train_speech_commands"):
        weights = finished_runs[learnt] / "last.ckpt"
        words = [*mswc_words, "--weights", weights]
        known = r"was trained on spectrograms of shape \(1, 97, 40\), not"
        for recipe in ("train_mswc", "train_speech_commands"):
            own = words if recipe == "train_mswc" else [*speech_words, "--weights", weights]
            refused(rf"{weights} {known} \(1, 97, 32\): give its n_mels", recipe, *own, "--n_mels", 32)
            refused(rf"{weights} {known} \(1, 49, 40\): give its n_mels", recipe, *own, "--hop_ms", 20)


def test_archive_that_is_none(refused, mswc_words, here):
    (here / "ar.tar.gz").write_bytes(b"no archive" * 100)
    (here / "data").mkdir()
    refused(
        r"ar\.tar\.gz cannot be unpacked \(.*\): download it again",
        "train_mswc",
        *mswc_words,
        "--data_dir",
        "data",
        "--archives",
        "ar.tar.gz",
    )


def test_mswc_table_without_a_column(refused, mswc_words, own_mswc):
    table = own_mswc / "ar_splits.csv"
    whole = table.read_text(encoding="utf-8")
    for column in ("LINK", "WORD", "VALID", "SET"):
        table.write_text(whole.replace(column, "OTHER", 1), encoding="utf-8")
        message = rf"ar_splits\.csv has no column {column}, only .*: is it MSWC's table\?"
        refused(message, "train_mswc", *mswc_words, "--data_dir", "data")


def test_mswc_word_without_clips(refused, mswc_words, own_mswc):
    for path in (own_mswc / "clips/واحد").iterdir():
        path.unlink()
    message = "14 of 42 clips that the splits name are missing, .* the first; there is none at all of ar/واحد"
    refused(message, "train_mswc", *mswc_words, "--data_dir", "data")


def test_clips_that_cannot_be_decoded_are_left_out_on_request(command, refused, mswc_words, own_mswc, here, caplog):
    clips = sorted((own_mswc / "clips/واحد").iterdir(), key=lambda path: int(path.stem.rpartition("_")[2]))
    clips[0].write_bytes(b"")  # a training clip
    clips[1].write_bytes(clips[1].read_bytes()[:40])
    words = [*mswc_words, "--data_dir", "data"]
    refused(r"_0\.opus cannot be decoded \(.*\): remove it or give --skip_broken true", "train_mswc", *words)
    assert command("train_mswc", *words, "--skip_broken").status == 0
    assert json.loads((here / "out/report.json").read_text())["train_samples"] == 22
    (message,) = (message for message in caplog.messages if "left out" in message)
    assert re.match(r"2 of 42 clips are left out: .*_0\.opus cannot be decoded \(.*\), the first$", message)


def test_recording_that_is_cut_short_is_left_out_on_request(command, refused, speech_words, own_speech, here, caplog):
    clip = own_speech / "yes/aaaaaaaa_nohash_0.wav"
    clip.write_bytes(clip.read_bytes()[:8000])
    words = [*speech_words, "--data_dir", "data"]
    message = r"yes/aaaaaaaa_nohash_0\.wav is cut short \(7956 of 32000 bytes\): remove it or give --skip_broken true"
    refused(message, "train_speech_commands", *words)
    assert command("train_speech_commands", *words, "--skip_broken").status == 0
    assert json.loads((here / "out/report.json").read_text())["train_samples"] == 59
    assert sum("1 of 100 clips are left out" in message for message in caplog.messages) == 1


def test_speech_commands_with_something_else(refused, speech_words, own_speech):
    words = ["train_speech_commands", *speech_words, "--data_dir", "data"]
    (own_speech / "cat").mkdir()
    refused(r"class folder .*v0\.02/cat has no clips: add some, remove it or give --skip_broken true", *words)
    (own_speech / "cat").rename(own_speech / "banana")
    refused("banana is none of the 35 words of Speech Commands version 2: move it elsewhere", *words)
    (own_speech / "banana").rmdir()
    (own_speech / "yes/somebody.wav").write_bytes((own_speech / "yes/aaaaaaaa_nohash_0.wav").read_bytes())
    refused(r"yes/somebody\.wav is not named <speaker>_nohash_<number>\.wav", *words)
    (own_speech / "yes/somebody.wav").unlink()
    shutil.rmtree(own_speech / "go")
    refused("lists? .*|go has no clips, and task words10 needs some", *words)


def test_list_that_names_a_clip_that_is_not_there(command, refused, speech_words, own_speech, here):
    with (own_speech / "testing_list.txt").open("a") as file:
        file.write("yes/dddddddd_nohash_0.wav\n")
    words = ["train_speech_commands", *speech_words, "--data_dir", "data"]
    place = r"testing_list\.txt, line 23, yes/dddddddd_nohash_0\.wav, names no clip"
    refused(f"{place}: correct the list or give --skip_broken true", *words)
    assert command(*words, "--skip_broken").status == 0
    assert json.loads((here / "out/report.json").read_text())["test_samples"] == 20


def test_list_that_is_missing(refused, speech_words, own_speech):
    (own_speech / "validation_list.txt").unlink()
    message = r"validation_list\.txt is missing: take it from the archive http"
    refused(message, "train_speech_commands", *speech_words, "--data_dir", "data")


def test_silence_needs_recordings(refused, speech_words, own_speech):
    shutil.rmtree(own_speech / "_background_noise_")
    message = "_background_noise_ has no recordings, and the silence of words12 is cut from them"
    refused(message, "train_speech_commands", *speech_words, "--data_dir", "data", "--task", "words12")


def test_recordings_of_another_rate_and_in_stereo_work(command, speech_words, own_speech, here):
    rng = np.random.default_rng(0)
    for path in (own_speech / "yes").iterdir():
        soundfile.write(path, rng.normal(0, 0.1, (44_100, 2)), 44_100, subtype="PCM_16")
    assert command("train_speech_commands", *speech_words, "--data_dir", "data").status == 0
    assert json.loads((here / "out/report.json").read_text())["train_samples"] == 60


# ---- ImageNet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data_dir", "nowhere"],
            r"nowhere has neither val/ nor ILSVRC2012_img_val\.tar: give the folder that holds",
        ),
        (["--smallest_crop", "0"], "smallest_crop 0.0 is no fraction of a picture: give one such as 0.25"),
        (["--evaluate_only"], "evaluate_only tests weights: give them with --weights"),
        (["--ema_decay", "1.5"], "ema_decay is 1.5: give 0 or more, at most 1"),
        (["--num_nodes", "0"], "num_nodes is 0: give 1 or more"),
    ],
)
def test_imagenet(words, message, refused, imagenet_words):
    refused(message, "train_imagenet", *imagenet_words, *words)


def test_imagenet_with_something_else(command, refused, imagenet_words, own_imagenet, here, caplog):
    words = ["train_imagenet", *imagenet_words, "--data_dir", "data"]
    (own_imagenet / "train/n00000000").mkdir()
    refused("data/train/n00000000 is none of the 1000 classes, .* like n01440764: is this ImageNet", *words)
    (own_imagenet / "train/n00000000").rename(own_imagenet / "train/n01443537")
    refused("class folder data/train/n01443537 has 0 images: add images or remove it", *words)
    (own_imagenet / "train/n01443537").rmdir()
    (own_imagenet / "val/n01440764/notes.txt").write_text("not a picture")
    refused(r"val/n01440764/notes\.txt is not an image file: remove it or give --skip_broken true", *words)
    (own_imagenet / "train/n01440764/cut.JPEG").write_bytes(b"no picture")
    assert command(*words, "--skip_broken").status == 0
    assert json.loads((here / "out/report.json").read_text())["train_samples"] == 33
    left_out = [message for message in caplog.messages if "left out" in message]
    assert len(left_out) == 2


def test_broken_image_of_imagenet_is_one_line_too(command, imagenet_words, own_imagenet):
    """It is found only when its turn comes, so that the run's folder is there by then."""
    for path in (own_imagenet / "train/n01440764").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    ended = command("train_imagenet", *imagenet_words, "--data_dir", "data")
    assert ended.status == 2
    assert re.search(r"n01440764/\d\d\.JPEG cannot be read as an image .*--skip_broken", ended.errors.splitlines()[-1])
    assert "Traceback" not in ended.errors


# ---- testing alone


def test_evaluation(refused, cifar_words, folder_words, finished_runs, tiny_images, here):
    words = [*cifar_words, "--evaluate_only"]
    refused("evaluate_only tests weights: give them with --weights", "train_cifar", *words)
    other = finished_runs["train_image_folder"] / "last.ckpt"
    message = rf"the classifier of weights {other} is \(3, 112\), and 10 classes of 112 features are wanted: give"
    refused(message, "train_cifar", *words, "--weights", other)

    shutil.copytree(tiny_images, here / "pictures")
    (here / "pictures/red").rename(here / "pictures/scarlet")
    message = f"{other} knows blue, green, red, the data has blue, green, scarlet: give the data it learnt"
    words = [*folder_words, "--evaluate_only", "--weights", other, "--data_dir", "pictures"]
    refused(message, "train_image_folder", *words)


def test_evaluation_of_many_other_classes(refused, speech_words, finished_runs):
    """Of the same number; of many, three are named."""
    words = [*speech_words, "--evaluate_only", "--weights", finished_runs["train_cifar"] / "last.ckpt"]
    message = r"knows class 0, class 1, class 2, \.\.\. \(10\), the data has yes, no, up, \.\.\. \(10\): give"
    refused(message, "train_speech_commands", *words)


def test_evaluation_of_weights_without_a_classifier(shared_data, refused, cifar_words):
    weights = shared_data / "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"
    message = "the classifier of weights .* is none, and 10 classes of 112 features are wanted"
    refused(message, "train_cifar", *cifar_words, "--evaluate_only", "--weights", weights)


def test_lists_are_separated_by_commas(refused, mswc_words):
    refused(
        "'ar en' has blanks in it: separate by commas, as in ar,en", "train_mswc", *mswc_words, "--languages", "ar en"
    )


def test_folder_that_is_one_too_deep(refused, speech_words, imagenet_words, here):
    (here / "SpeechCommands").mkdir()
    message = "does not exist: data_dir is the folder that holds SpeechCommands/"
    refused(message, "train_speech_commands", *speech_words, "--data_dir", "SpeechCommands")
    (here / "val/n01440764").mkdir(parents=True)
    refused("val holds the classes: give the folder above it", "train_imagenet", *imagenet_words, "--data_dir", "val")


def test_folded_weights_have_no_batch_norm(refused, cifar_words, finished_runs):
    words = [*cifar_words, "--weights", finished_runs["train_cifar"] / "last.ckpt", "--scheme", "none"]
    refused("has no batch norm, which --scheme none trains with: give --scheme full", "train_cifar", *words)


def test_single_samples_have_no_statistics(refused, cifar_words):
    words = [*cifar_words, "--scheme", "none", "--batch_size", "1"]
    refused("batch_size is 1, and batch norm has no statistics of one sample: give 2 or more", "train_cifar", *words)


def test_a_rule_that_nothing_fits_says_what_it_updates(command, cifar_words, here, caplog):
    words = ["--scheme", "sub_tensor", "--sram_bytes", "40000", "--allow_oversize"]
    ended = command("train_cifar", *cifar_words, *words)
    assert ended.status == 0
    assert "sub_tensor takes what fits custom, and nothing does: the classifier alone is updated" in caplog.messages
