"""The job that the recipes share: its defaults, its averaged weights, where it starts from, and testing alone."""

import importlib
import json
import math
import shutil
from typing import get_args

import pytest
import torch
import yaml
from lightning.pytorch import callbacks

from microtune.datamodules.cifar import CIFAR
from microtune.datamodules.keyword_audio import KeywordFrontEnd
from microtune.datamodules.speech_commands import COMMANDS
from microtune.modules.classifier import Classifier
from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import dynamic_choice
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.networks.pretrained_weights import NORMALIZATION
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import called_with
from microtune.recipes.training.memory_figures import memory_figures, scheme_fits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CLASSIFIER = ("net.classifier.1.weight", "net.classifier.1.bias")


def main_of(recipe):
    """The recipe, to be called with flat arguments as the command line has them."""
    main = importlib.import_module(f"microtune.recipes.{recipe}").main
    return lambda **arguments: called_with(main, arguments)


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def read_checkpoint(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def hyperparameters(folder):
    return read_checkpoint(folder)["hyper_parameters"]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def train(tiny_run, tmp_path):
    """Calls ``train("train_cifar", epochs=2)``: one epoch, and everything else as the recipe has it by default."""

    def call(recipe, **changed):
        defaults = {"epochs": 1, "scheme": None, "learning_rate": None}
        return main_of(recipe)(**tiny_run(recipe) | defaults | {"out_dir": tmp_path / "run"} | changed)

    return call


@pytest.fixture(scope="session")
def unfolded_run(tiny_run, tmp_path_factory):
    """The folder of a run from scratch, with batch norm, whose width is none that is usual by default."""
    folder = tmp_path_factory.mktemp("unfolded") / "run"
    main_of("train_cifar")(**tiny_run("train_cifar") | {"scheme": "none", "width": 0.5, "out_dir": folder})
    return folder


@pytest.fixture
def weights(finished_runs, unfolded_run):
    """Checkpoints to start from, by what they are."""
    return {
        "none": "none",
        "folded": finished_runs["train_cifar"] / "last.ckpt",
        "unfolded": unfolded_run / "last.ckpt",
    }


# ---- what the plan says is what is trained


def test_hyperparameters_are_those_of_the_plan(weights, train, tmp_path):
    """Defaults, and a zero that is given; every combination is in test_plan.py."""
    train("train_cifar", weights=str(weights["folded"]), momentum=0.0, label_smoothing=0.2)
    found = hyperparameters(tmp_path / "run")
    expected = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.2, "learning_rate": 0.1 / 256 * 16}
    assert {name: found[name] for name in expected} == expected
    assert found["network"]["folded"] is True
    assert (tmp_path / "run/scheme.json").exists()
    assert "averaging_state" not in read_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("recipe", ["train_speech_commands", "train_mswc"])
def test_speech_from_scratch_has_its_own_learning_rate_and_batch_norm(recipe, limited, train, tmp_path):
    limited(limit_train_batches=1, limit_val_batches=1)
    train(recipe)
    found = hyperparameters(tmp_path / "run")
    assert found["learning_rate"] == 0.1 * 16 / 32
    assert (found["momentum"], found["network"]["folded"]) == (0.9, False)
    assert not (tmp_path / "run/scheme.json").exists()


def test_default_scheme_of_weights_is_as_much_as_fits(finished_runs, weights, train, tmp_path):
    train("train_cifar", weights=str(weights["folded"]))
    schemes = [UpdateScheme.load(folder / "scheme.json") for folder in (tmp_path / "run", finished_runs["train_cifar"])]
    assert schemes[0] == schemes[1]
    assert schemes[0].weights


# ---- averaged weights


@pytest.mark.parametrize(
    ("options", "decays"),
    [({}, [3 / 13]), ({"ema_decay": 0}, []), ({"scheme": "classifier"}, []), ({"ema_decay": 0.5}, [0.5])],
)
def test_imagenet_from_scratch_has_averaged_weights(options, decays, monkeypatch, train, tmp_path):
    made = []
    original = callbacks.EMAWeightAveraging
    monkeypatch.setattr(callbacks, "EMAWeightAveraging", lambda decay: made.append(decay) or original(decay=decay))
    train("train_imagenet", batch_size=11, **options)  # without a last batch of one, which batch norm refuses
    assert made == decays
    assert ("averaging_state" in read_checkpoint(tmp_path / "run")) is bool(decays)


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_checkpoint_and_report_are_about_averaged_weights(
    scheme, tiny_cifar, monkeypatch, train, evaluated, weights_of, tmp_path
):
    """The average is reckoned here from the weights after every step, by its definition."""
    after_steps = []

    def keep(module, *_):
        after_steps.append({f"net.{name}": value.clone() for name, value in module.net.state_dict().items()})

    monkeypatch.setattr(Classifier, "on_train_batch_end", keep)
    report = train("train_cifar", scheme=scheme, ema_decay=0.5, learning_rate=0.2, allow_oversize=True)
    assert len(after_steps) == 6
    kept = weights_of(tmp_path / "run")
    current = read_checkpoint(tmp_path / "run")["current_model_state"]
    differing = 0
    assert kept.keys() == after_steps[0].keys()
    for name in kept:
        if name.endswith("num_batches_tracked"):
            continue
        average = after_steps[0][name]
        for step in after_steps[1:]:
            average = 0.5 * average + 0.5 * step[name]
        torch.testing.assert_close(kept[name], average, msg=name)
        differing += not torch.equal(kept[name], current[name])
    assert differing >= 2

    module = Classifier.load_from_checkpoint(tmp_path / "run/last.ckpt")
    data = CIFAR(tiny_cifar, resolution=32, normalization=NORMALIZATION["symmetric"])
    assert (report["top1"], report["loss"]) == pytest.approx(evaluated(module, data), rel=1e-4)


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_averaged_weights_are_resumed(scheme, train, interrupt, weights_of, tmp_path):
    options = {"scheme": scheme, "ema_decay": 0.9, "epochs": 2, "learning_rate": 0.05}
    whole = train("train_cifar", **options, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train("train_cifar", **options)
    resumed = train("train_cifar", **options, resume=True)
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))
    one, other = (read_checkpoint(tmp_path / name)["current_model_state"] for name in ("whole", "run"))
    assert_equal_weights(one, other)
    assert whole | {"seconds": 0} == resumed | {"seconds": 0}


def test_frozen_entries_stay_as_they_were_under_averaging(weights, train, weights_of, tmp_path):
    train("train_cifar", weights=str(weights["folded"]), scheme="classifier", ema_decay=0.5, learning_rate=0.1)
    before, after = weights_of(weights["folded"].parent), weights_of(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(CLASSIFIER)


# ---- what it starts from


def test_width_is_that_of_the_weights(train, tmp_path):
    torch.save(mobilenet_v2(0.5).state_dict(), tmp_path / "half.pth")
    train("train_cifar", weights=str(tmp_path / "half.pth"), scheme="classifier", out_dir=tmp_path / "first")
    train("train_cifar", weights=str(tmp_path / "first/last.ckpt"), scheme="classifier", out_dir=tmp_path / "second")
    train("train_cifar", scheme="classifier", out_dir=tmp_path / "third")
    widths = [hyperparameters(tmp_path / name)["network"]["width"] for name in ("first", "second", "third")]
    assert widths == [0.5, 0.5, 0.35]
    assert UpdateScheme.load(tmp_path / "second/scheme.json").network == "mobilenet_v2-w0.5"


def test_width_and_padding_of_real_weights(shared_data, limited, train, tmp_path):
    limited(limit_train_batches=1, limit_val_batches=1)
    keras = shared_data / "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"
    train("train_cifar", weights=str(keras), scheme="classifier", out_dir=tmp_path / "keras")
    torchvision = shared_data / "weights/mobilenet_v2-b0353104.pth"
    train(
        "train_cifar",
        weights=str(torchvision),
        scheme="classifier",
        allow_oversize=True,
        out_dir=tmp_path / "torchvision",
    )
    networks = [hyperparameters(tmp_path / name)["network"] for name in ("keras", "torchvision")]
    assert [(network["width"], network["padding"]) for network in networks] == [(0.35, "keras"), (1.0, "symmetric")]


def test_class_names_are_in_the_checkpoint(finished_runs):
    found = {recipe: hyperparameters(folder)["class_names"] for recipe, folder in finished_runs.items()}
    assert found["train_cifar"] == [f"class {number}" for number in range(10)]
    assert found["train_image_folder"] == ["blue", "green", "red"]
    assert found["train_speech_commands"] == list(COMMANDS)
    assert found["train_mswc"] == sorted(("واحد", "اثنان", "ثلاثة"))
    assert len(found["train_imagenet"]) == 1000
    assert found["train_imagenet"][0] == "tench"


@pytest.mark.parametrize("renamed", [{}, {"red": "scarlet"}, {"blue": "ultramarine"}])
def test_classifier_is_kept_if_its_classes_are_the_same(
    renamed, finished_runs, tiny_images, train, weights_of, tmp_path
):
    """Learning rate 0 leaves what training starts from."""
    shutil.copytree(tiny_images, tmp_path / "pictures")
    for before, after in renamed.items():
        (tmp_path / "pictures" / before).rename(tmp_path / "pictures" / after)
    earlier = finished_runs["train_image_folder"]
    train(
        "train_image_folder", data_dir=tmp_path / "pictures", weights=str(earlier / "last.ckpt"), learning_rate=0.0
    )  # fmt: skip
    one, other = weights_of(earlier), weights_of(tmp_path / "run")
    kept = {name for name in one if torch.equal(one[name], other[name])}
    assert kept == one.keys() - (set(CLASSIFIER) if renamed else set())
    if renamed:
        assert other[CLASSIFIER[1]].eq(0).all()  # a fresh one's


def test_loss_of_thousand_real_classes(shared_data, limited, train, tmp_path):
    """Fine-tuning of torchvision's weights with their own head and classifier, of which the data is the images."""
    limits = {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 2}
    limited(**limits)
    weights = shared_data / "weights/mobilenet_v2-b0353104.pth"
    report = train(
        "train_imagenet", data_dir=shared_data / "imagenet", weights=str(weights), resolution=64, scheme="sub_tensor",
        head_convolution=True, learning_rate=0.001,
    )  # fmt: skip
    assert [report[name] for name in ("train_samples", "val_samples", "test_samples")] == [800, 100, 100]
    assert report["classes"] == 1000
    assert math.isfinite(report["loss"])
    found, state = hyperparameters(tmp_path / "run"), read_checkpoint(tmp_path / "run")["state_dict"]
    assert (found["network"]["head_convolution"], found["network"]["width"]) == (True, 1.0)
    original = torch.load(weights, weights_only=True)
    name = "classifier.1.weight"
    assert state[f"net.{name}"].shape == (1000, 1280)
    assert 0 < (state[f"net.{name}"] - original[name]).abs().max() < 0.1


# ---- testing alone


@pytest.mark.parametrize("recipe", ["train_cifar", "train_image_folder", "train_mswc", "train_speech_commands"])
def test_evaluation_gives_the_figures_of_the_run(recipe, finished_runs, train, tmp_path):
    folder = finished_runs[recipe]
    options = {"weights": str(folder / "last.ckpt"), "evaluate_only": True, "out_dir": tmp_path / "evaluated"}
    report, earlier = train(recipe, **options), read_report(folder)
    measured = {"top1", "top5", "val_top1", "loss", "classes", "train_samples", "val_samples", "test_samples"}
    assert {name: report.get(name) for name in measured} == {name: earlier.get(name) for name in measured}
    assert report["epochs"] == 0
    assert "peak_memory_bytes" not in report
    assert {path.name for path in (tmp_path / "evaluated").iterdir()} == {"config.yaml", "metrics", "report.json"}


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_evaluation_of_what_has_learnt_something(scheme, unfolded_run, train, tmp_path):
    """With batch norm and without, and with logits that differ."""
    start = {"weights": str(unfolded_run / "last.ckpt"), "scheme": scheme, "learning_rate": 0.05}
    earlier = train("train_cifar", **start, out_dir=tmp_path / "earlier")
    report = train("train_cifar", weights=str(tmp_path / "earlier/last.ckpt"), evaluate_only=True)
    measured = ("top1", "top5", "val_top1", "loss", "train_samples", "val_samples", "test_samples", "classes")
    assert {name: report[name] for name in measured} == {name: earlier[name] for name in measured}
    assert not (tmp_path / "run/last.ckpt").exists()
    assert (tmp_path / "earlier/scheme.json").exists() is (scheme == "sub_tensor")
    assert not (tmp_path / "run/scheme.json").exists()


def test_saved_configuration_reproduces_the_evaluation(finished_runs, train, command, tmp_path):
    first = train("train_cifar", weights=str(finished_runs["train_cifar"] / "last.ckpt"), evaluate_only=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["evaluate_only"] is True
    ended = command("train_cifar", "--config", tmp_path / "run/config.yaml", "--out_dir", tmp_path / "again")
    assert ended.status == 0
    assert read_report(tmp_path / "again") | {"seconds": 0} == first | {"seconds": 0}


@pytest.fixture
def only_val(tiny_imagenet, tmp_path):
    """ImageNet of which there is only val/."""
    shutil.copytree(tiny_imagenet / "val", tmp_path / "imagenet/val")
    return tmp_path / "imagenet"


def test_evaluation_on_imagenet_needs_only_val(only_val, finished_runs, train):
    folder = finished_runs["train_imagenet"]
    report = train("train_imagenet", data_dir=only_val, weights=str(folder / "last.ckpt"), evaluate_only=True)
    earlier = read_report(folder)
    measured = ("top1", "top5", "loss", "classes", "test_samples")
    assert {name: report[name] for name in measured} == {name: earlier[name] for name in measured}
    assert (report["train_samples"], report["val_samples"]) == (0, 1)


def test_imagenet_of_which_only_val_is_there_is_shared_out_for_training(only_val, train, caplog):
    report = train("train_imagenet", data_dir=only_val, evaluate_only=False)
    assert [report[name] for name in ("train_samples", "val_samples", "test_samples")] == [10, 1, 1]
    assert f"{only_val / 'train'} is missing and {only_val / 'val'} is shared out" in caplog.text


def test_evaluation_of_real_weights(shared_data, limited, train):
    """torchvision's weights know these images, of which some are their own training images."""
    limited(limit_val_batches=1, limit_test_batches=3)
    weights = shared_data / "weights/mobilenet_v2-b0353104.pth"
    report = train(
        "train_imagenet", data_dir=shared_data / "imagenet", weights=str(weights), resolution=224,
        head_convolution=True, evaluate_only=True,
    )  # fmt: skip
    assert report["test_samples"] == 1000
    assert report["top1"] > 0.7
    assert report["top5"] > 0.85


# ---- options of train_cifar


def test_without_validation(train, tmp_path):
    """Nothing is held out, nothing is validated, and what is tested is the same."""
    report = train("train_cifar", validation_fraction=0.0, scheme="classifier")
    assert [report[name] for name in ("train_samples", "val_samples", "test_samples")] == [100, 0, 20]
    assert report.keys() >= {"top1", "top5", "loss"}
    assert "val_top1" not in read_report(tmp_path / "run")
    logged = "".join(path.read_text() for path in (tmp_path / "run").rglob("metrics.csv"))
    assert "test/top1" in logged
    assert "val/" not in logged
    weights = str(tmp_path / "run/last.ckpt")
    again = train(
        "train_cifar", weights=weights, evaluate_only=True, validation_fraction=0.0, out_dir=tmp_path / "again"
    )
    assert [again[name] for name in ("top1", "loss")] == [report[name] for name in ("top1", "loss")]
    assert "val_top1" not in again


def test_augmentation_of_cifar(train, weights_of, tmp_path):
    """Each ends elsewhere; shift is the default."""
    found = {}
    for augmentation in ("default", "shift", "crop", "none"):
        given = {} if augmentation == "default" else {"augmentation": augmentation}
        train("train_cifar", scheme="classifier", learning_rate=0.1, out_dir=tmp_path / augmentation, **given)
        found[augmentation] = weights_of(tmp_path / augmentation)[CLASSIFIER[0]]
    assert torch.equal(found["default"], found["shift"])
    for one, other in (("shift", "crop"), ("shift", "none"), ("crop", "none")):
        assert not torch.equal(found[one], found[other])


# ---- compiled, and in other precisions


@pytest.fixture
def two_steps(limited):
    """Lets runs end after two batches of each split."""
    limits = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    limited(**limits)


@pytest.fixture
def compilations(monkeypatch):
    """The networks that were compiled: traced, without the making of machine code, which takes a minute or two."""
    made = []
    original = torch.nn.Module.compile

    def compile(network, *arguments, **options):
        made.append(network)
        original(network, *arguments, **options, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["sub_tensor"])
def test_compiled_run_ends_nearly_as_one_that_is_not(
    scheme, two_steps, compilations, unfolded_run, train, weights_of, tmp_path
):
    options = {"scheme": scheme, "learning_rate": 0.01, "weights": str(unfolded_run / "last.ckpt")}
    plain = train("train_cifar", **options, out_dir=tmp_path / "plain")
    assert compilations == []
    report = train("train_cifar", **options, compile=True)
    assert len(compilations) == 1
    one, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "run")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3, msg=name)
    assert report["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("recipe", ["train_cifar", "train_speech_commands"])
@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_other_precisions(scheme, recipe, precision, train, weights_of, tmp_path):
    report = train(recipe, scheme=scheme, learning_rate=0.01, precision=precision)
    assert 0 < report["loss"] < 10
    kept = {value.dtype for name, value in weights_of(tmp_path / "run").items() if name.endswith("weight")}
    assert kept == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


# In bf16 a draw of 0.999 would be 1, which is out of bounds where background noise is chosen.
def test_random_numbers_of_augmentation_keep_their_precision(monkeypatch, train):
    found = set()
    original = KeywordFrontEnd.forward

    def forward(front_end, batch):
        found.update(part.dtype for part in batch)
        return original(front_end, batch)

    monkeypatch.setattr(KeywordFrontEnd, "forward", forward)
    train("train_speech_commands", scheme="classifier", precision="bf16-true")
    assert found == {torch.int16, torch.int64, torch.int32}


# ---- which channels


@pytest.mark.parametrize("choice", get_args(Criterion))
def test_every_criterion_chooses_channels_in_training(choice, scheme_file, train, tmp_path):
    options = {"scheme": str(scheme_file), "channel_choice": choice, "choice_samples": 16, "allow_oversize": True}
    report = train("train_cifar", **options, rechoose_every=2, learning_rate=0.05)
    (state,) = (state for key, state in read_checkpoint(tmp_path / "run")["callbacks"].items() if "SparseUpd" in key)
    assert state["channel_choice"] == report["channel_choice"] == choice
    assert state["rechoose_every"] == report["rechoose_every"] == 2
    assert state["chosen_at_step"] == 4  # of 6 steps
    assert {name: len(channels) for name, channels in state["channels"].items() if len(channels) < 16} == {
        "features.15.conv.0.0": 7,
    }
    assert math.isfinite(report["loss"])


def test_choice_by_data_of_keywords(train):
    """Whose spectrograms are made between the loader and the training step."""
    report = train("train_speech_commands", scheme="sub_tensor", channel_choice="taylor", choice_samples=8)
    assert report["channel_choice"] == "taylor"
    assert not {"rechoose_every", "rechoosing_peak_memory_bytes"} & report.keys()


def test_report_says_nothing_of_the_usual_choice(finished_runs):
    assert not {"channel_choice", "rechoose_every", "rechoosing_peak_memory_bytes"} & set(
        read_report(finished_runs["train_cifar"])
    )


def test_dynamic_run_is_resumed(train, interrupt, weights_of, tmp_path):
    options = {"scheme": "sub_tensor", "channel_choice": "fisher", "rechoose_every": 4, "choice_samples": 16}
    options |= {"momentum": 0.9, "epochs": 2, "learning_rate": 0.05}
    whole = train("train_cifar", **options, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train("train_cifar", **options)
    resumed = train("train_cifar", **options, resume=True)
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))
    assert whole | {"seconds": 0} == resumed | {"seconds": 0}


def test_memory_of_a_dynamic_run(scheme_file, train):
    scheme, operations = UpdateScheme.load(scheme_file), find_operations(mobilenet_v2(0.35, 10), (3, 32, 32))
    report = train("train_cifar", scheme=str(scheme_file), channel_choice="taylor", rechoose_every=3)
    choice = dynamic_choice(operations, scheme, "taylor")
    peak_bytes = PeakMemory(operations).peak_bytes(scheme)
    assert report["peak_memory_bytes"] == peak_bytes
    assert report["rechoosing_peak_memory_bytes"] == peak_bytes + choice.score_bytes
    assert report["sram_margin_bytes"] == report["budget_bytes"] - report["rechoosing_peak_memory_bytes"]
    assert report["flash_bytes"] == choice.flash_bytes
    assert report["fits"]


@pytest.mark.parametrize(
    ("choice", "lacking"),
    [
        ("taylor", "sram"),
        ("loss_decrease", "sram"),
        ("random", "flash"),
        ("weight_norm", "flash"),
    ],
)
def test_dynamic_run_that_does_not_fit_although_a_step_does(choice, lacking, scheme_file, train, tmp_path):
    scheme, operations = UpdateScheme.load(scheme_file), find_operations(mobilenet_v2(0.35, 10), (3, 32, 32))
    peak_bytes, score_bytes = PeakMemory(operations).peak_bytes(scheme), 4 * (56 + 56)
    if choice == "loss_decrease":
        peak_bytes = PeakMemory(operations, gradient_accumulation=True).peak_bytes(scheme)
    whole_bytes = dynamic_choice(operations, scheme, choice).flash_bytes
    enough = {"sram": (peak_bytes + score_bytes, None), "flash": (10**6, whole_bytes)}[lacking]
    less = {"sram": (enough[0] - 1, None), "flash": (10**6, whole_bytes - 1)}[lacking]

    def fits(sram_bytes, flash_bytes, rechosen_by):
        account = (PeakMemory(operations), scheme, microcontroller(None, sram_bytes, flash_bytes, 0), rechosen_by)
        assert memory_figures(*account)["fits"] is scheme_fits(*account)
        return scheme_fits(*account)

    assert fits(*enough, choice)
    assert fits(*less, None)
    assert not fits(*less, choice)
    message = rf"one training step fits custom, but choosing channels anew by {choice} needs [\d.]+ KiB "
    message += {"sram": "at its peak, but there are", "flash": "of flash for what leaves, but there are"}[lacking]
    options = {"channel_choice": choice, "rechoose_every": 100, "reserve_bytes": 0, "scheme": str(scheme_file)}
    with pytest.raises(UserError, match=message + r" [\d.]+ KiB: choose once, or update fewer .*--allow_oversize"):
        train("train_cifar", **options, sram_bytes=less[0], flash_bytes=less[1])
    assert not (tmp_path / "run").exists()


def test_scheme_that_fills_leaves_room_for_scores(train):
    options = {"channel_choice": "loss_decrease", "rechoose_every": 3, "scheme": "sub_tensor", "sram_bytes": 150_000}
    report = train("train_cifar", **options, reserve_bytes=0)
    assert report["fits"]
    assert report["peak_memory_bytes"] < report["rechoosing_peak_memory_bytes"] <= 150_000


def test_choice_that_a_file_leaves_nothing_for_is_refused_before_the_run(train, tmp_path):
    """What names of schemes say is in test_plan.py."""
    UpdateScheme("mobilenet_v2-w0.35", 3).save(tmp_path / "biases.json")
    with pytest.raises(UserError, match=r"^rechoose_every is 3, but there is nothing to choose: "):
        train("train_cifar", scheme=str(tmp_path / "biases.json"), rechoose_every=3)
    assert not (tmp_path / "run").exists()
