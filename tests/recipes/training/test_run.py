"""What surrounds a training: the plan is what is trained, what is tested alone, compiled, and in other precisions."""

import shutil

import pytest
import torch
import yaml

from microtune.datamodules.keyword_audio import KeywordFrontEnd
from microtune.modules.sparse_update.update_scheme import UpdateScheme

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# ---- what the plan says is what is trained


def test_plan_is_what_is_trained(folded, finished_runs, two_steps, train, checkpoint_of, tmp_path):
    """Defaults, a zero that is given, and as much as fits; every combination is in test_plan.py."""
    train("train_cifar", weights=folded, momentum=0.0, label_smoothing=0.2)
    checkpoint = checkpoint_of(tmp_path / "run")
    found = checkpoint["hyper_parameters"]
    expected = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.2, "learning_rate": 0.1 / 256 * 16}
    assert {name: found[name] for name in expected} == expected
    assert found["network"]["folded"] is True
    assert "averaging_state" not in checkpoint
    schemes = [UpdateScheme.load(folder / "scheme.json") for folder in (tmp_path / "run", finished_runs["train_cifar"])]
    assert schemes[0] == schemes[1]
    assert schemes[0].weights


@pytest.mark.parametrize("recipe", ["train_speech_commands", "train_mswc"])
def test_speech_from_scratch_has_its_own_learning_rate_and_batch_norm(
    recipe, two_steps, train, checkpoint_of, tmp_path
):
    train(recipe)
    found = checkpoint_of(tmp_path / "run")["hyper_parameters"]
    assert found["learning_rate"] == 0.1 * 16 / 32
    assert (found["momentum"], found["network"]["folded"]) == (0.9, False)
    assert not (tmp_path / "run/scheme.json").exists()


# ---- testing alone


@pytest.mark.parametrize("recipe", ["train_cifar", "train_image_folder", "train_mswc", "train_speech_commands"])
def test_evaluation_gives_the_figures_of_the_run(recipe, finished_runs, train, report_of, tmp_path):
    """ImageNet's is below."""
    folder = finished_runs[recipe]
    options = {"weights": str(folder / "last.ckpt"), "evaluate_only": True, "out_dir": tmp_path / "evaluated"}
    report, earlier = train(recipe, **options), report_of(folder)
    measured = {"top1", "top5", "val_top1", "loss", "classes", "train_samples", "val_samples", "test_samples"}
    assert {name: report.get(name) for name in measured} == {name: earlier.get(name) for name in measured}
    assert report["epochs"] == 0
    assert "peak_memory_bytes" not in report
    assert {path.name for path in (tmp_path / "evaluated").iterdir()} == {"config.yaml", "metrics", "report.json"}


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_evaluation_of_what_has_learnt_something(scheme, unfolded, train, tmp_path):
    """With batch norm and without, and with logits that differ."""
    start = {"weights": unfolded, "scheme": scheme, "learning_rate": 0.05}
    earlier = train("train_cifar", **start, out_dir=tmp_path / "earlier")
    report = train("train_cifar", weights=str(tmp_path / "earlier/last.ckpt"), evaluate_only=True)
    measured = ("top1", "top5", "val_top1", "loss", "train_samples", "val_samples", "test_samples", "classes")
    assert {name: report[name] for name in measured} == {name: earlier[name] for name in measured}
    assert not (tmp_path / "run/last.ckpt").exists()
    assert (tmp_path / "earlier/scheme.json").exists() is (scheme == "sub_tensor")
    assert not (tmp_path / "run/scheme.json").exists()


def test_saved_configuration_reproduces_the_evaluation(folded, train, command, report_of, tmp_path):
    first = train("train_cifar", weights=folded, evaluate_only=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["evaluate_only"] is True
    ended = command("train_cifar", "--config", tmp_path / "run/config.yaml", "--out_dir", tmp_path / "again")
    assert ended.status == 0
    assert report_of(tmp_path / "again") | {"seconds": 0} == first | {"seconds": 0}


@pytest.fixture
def only_val(tiny_imagenet, tmp_path):
    """ImageNet of which there is only val/."""
    shutil.copytree(tiny_imagenet / "val", tmp_path / "imagenet/val")
    return tmp_path / "imagenet"


def test_evaluation_on_imagenet_needs_only_val(only_val, finished_runs, train, report_of):
    folder = finished_runs["train_imagenet"]
    report = train("train_imagenet", data_dir=only_val, weights=str(folder / "last.ckpt"), evaluate_only=True)
    earlier = report_of(folder)
    measured = ("top1", "top5", "loss", "classes", "test_samples")
    assert {name: report[name] for name in measured} == {name: earlier[name] for name in measured}
    assert (report["train_samples"], report["val_samples"]) == (0, 1)


def test_imagenet_of_which_only_val_is_there_is_shared_out_for_training(only_val, two_steps, train, caplog):
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


def test_without_validation(two_steps, train, report_of, tmp_path):
    """Nothing is held out, nothing is validated, and what is tested is the same."""
    report = train("train_cifar", validation_fraction=0.0, scheme="classifier")
    assert [report[name] for name in ("train_samples", "val_samples", "test_samples")] == [100, 0, 20]
    assert report.keys() >= {"top1", "top5", "loss"}
    assert "val_top1" not in report_of(tmp_path / "run")
    logged = "".join(path.read_text() for path in (tmp_path / "run").rglob("metrics.csv"))
    assert "test/top1" in logged
    assert "val/" not in logged
    weights = str(tmp_path / "run/last.ckpt")
    again = train(
        "train_cifar", weights=weights, evaluate_only=True, validation_fraction=0.0, out_dir=tmp_path / "again"
    )
    assert [again[name] for name in ("top1", "loss")] == [report[name] for name in ("top1", "loss")]
    assert "val_top1" not in again


def test_augmentation_of_cifar(two_steps, train, weights_of, tmp_path):
    """Each ends elsewhere; shift is the default."""
    found = {}
    for augmentation in ("default", "shift", "crop", "none"):
        given = {} if augmentation == "default" else {"augmentation": augmentation}
        train("train_cifar", scheme="classifier", learning_rate=0.1, out_dir=tmp_path / augmentation, **given)
        found[augmentation] = weights_of(tmp_path / augmentation)["net.classifier.1.weight"]
    assert torch.equal(found["default"], found["shift"])
    for one, other in (("shift", "crop"), ("shift", "none"), ("crop", "none")):
        assert not torch.equal(found[one], found[other])


# ---- compiled, in other precisions, on a GPU


@pytest.mark.parametrize("compile", [False, True])
def test_network_is_compiled_where_that_is_asked_for(compile, two_steps, monkeypatch, train):
    """What compiling does to the training is in tests/callbacks/test_sparse_update.py."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    train("train_cifar", scheme="sub_tensor", compile=compile)
    assert [type(network).__name__ for network in compiled] == ["MobileNetV2"] * compile


# every pair of two of the three
@pytest.mark.parametrize(
    ("recipe", "scheme", "precision"),
    [
        ("train_cifar", "none", "bf16-mixed"),
        ("train_cifar", "sub_tensor", "bf16-true"),
        ("train_speech_commands", "none", "bf16-true"),
        ("train_speech_commands", "sub_tensor", "bf16-mixed"),
    ],
)
def test_other_precisions(recipe, scheme, precision, two_steps, train, weights_of, tmp_path):
    report = train(recipe, scheme=scheme, learning_rate=0.01, precision=precision)
    assert 0 < report["loss"] < 10
    kept = {value.dtype for name, value in weights_of(tmp_path / "run").items() if name.endswith("weight")}
    assert kept == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


# In bf16 a draw of 0.999 would be 1, which is out of bounds where background noise is chosen.
def test_random_numbers_of_augmentation_keep_their_precision(monkeypatch, two_steps, train):
    found = set()
    original = KeywordFrontEnd.forward

    def forward(front_end, batch):
        found.update(part.dtype for part in batch)
        return original(front_end, batch)

    monkeypatch.setattr(KeywordFrontEnd, "forward", forward)
    train("train_speech_commands", scheme="classifier", precision="bf16-true")
    assert found == {torch.int16, torch.int64, torch.int32}


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["train_cifar", "train_speech_commands"])
def test_training_on_a_gpu_ends_nearly_as_on_a_cpu(recipe, finished_runs, train, weights_of, tmp_path):
    """From weights that know the data; what the scheme leaves frozen is the same to the bit."""
    weights = finished_runs[recipe] / "last.ckpt"
    options = {"weights": str(weights), "scheme": "sub_tensor", "learning_rate": 0.01}
    reports = [train(recipe, **options, accelerator=kind, out_dir=tmp_path / kind) for kind in ("cpu", "gpu")]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-2)
    before, on_cpu, on_gpu = (weights_of(folder) for folder in (weights.parent, tmp_path / "cpu", tmp_path / "gpu"))
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=1e-2, atol=1e-3, msg=name)
        assert torch.equal(on_gpu[name].cpu(), before[name]) or not torch.equal(value, before[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_compiled_training_on_a_gpu_in_bf16(scheme, unfolded, train, weights_of, tmp_path):
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "compile": True, "learning_rate": 0.01}
    report = train("train_cifar", weights=unfolded, scheme=scheme, **options)
    assert 0 < report["loss"] < 10
    assert {value.dtype for name, value in weights_of(tmp_path / "run").items() if name.endswith("weight")} == {
        torch.float32
    }
