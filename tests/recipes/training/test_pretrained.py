"""What a training starts from: earlier weights, with their classifier if its classes are the same."""

import math

import pytest
import torch

from microtune.modules.classifier import Classifier
from microtune.recipes.training.networks import describe_network
from microtune.recipes.training.pretrained import load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SHAPE = (3, 32, 32)
CLASSIFIER = {"net.classifier.1.weight", "net.classifier.1.bias"}


@pytest.mark.parametrize(
    ("class_names", "is_kept"),
    [
        (["blue", "green", "red"], True),
        (["blue", "green", "scarlet"], False),
        (["green", "red", "ultramarine"], False),
    ],
)
def test_classifier_is_kept_if_its_classes_are_the_same(class_names, is_kept, finished_runs, weights_of):
    earlier = finished_runs["train_image_folder"]
    weights = str(earlier / "last.ckpt")
    module = Classifier(describe_network(weights, SHAPE, 3).to_train(has_scheme=True), class_names=class_names)
    load_pretrained(module, weights, SHAPE, whole=False)
    one, other = weights_of(earlier), module.state_dict()
    kept = {name for name in one if torch.equal(one[name], other[name])}
    assert kept == one.keys() - (set() if is_kept else CLASSIFIER)
    if not is_kept:
        assert other["net.classifier.1.bias"].eq(0).all()  # a fresh one's


def test_fine_tunes_from_a_checkpoint_of_a_sparse_run(folded, finished_runs, train, weights_of, tmp_path):
    train("train_cifar", weights=folded, scheme="classifier")
    first, then = weights_of(finished_runs["train_cifar"]), weights_of(tmp_path / "run")
    assert {name for name in first if not torch.equal(first[name], then[name])} == CLASSIFIER


def test_checkpoint_of_other_classes_gives_its_trunk(folded, finished_runs, train, weights_of, tmp_path):
    train("train_image_folder", weights=folded, scheme="classifier")
    first, then = weights_of(finished_runs["train_cifar"]), weights_of(tmp_path / "run")
    assert then["net.classifier.1.weight"].shape == (3, 112)
    trunk = [name for name in first if "features" in name]
    assert len(trunk) == 102
    assert all(torch.equal(first[name], then[name]) for name in trunk)


def test_loss_of_thousand_real_classes(shared_data, limited, train, checkpoint_of, tmp_path):
    """Fine-tuning of torchvision's weights with their own head and classifier, of which the data is the images."""
    limited(limit_train_batches=3, limit_val_batches=1, limit_test_batches=2)
    weights = shared_data / "weights/mobilenet_v2-b0353104.pth"
    report = train(
        "train_imagenet", data_dir=shared_data / "imagenet", weights=str(weights), resolution=64, scheme="sub_tensor",
        head_convolution=True, learning_rate=0.001,
    )  # fmt: skip
    assert [report[name] for name in ("train_samples", "val_samples", "test_samples")] == [800, 100, 100]
    assert report["classes"] == 1000
    assert math.isfinite(report["loss"])
    checkpoint = checkpoint_of(tmp_path / "run")
    network, state = checkpoint["hyper_parameters"]["network"], checkpoint["state_dict"]
    assert (network["head_convolution"], network["width"]) == (True, 1.0)
    original = torch.load(weights, weights_only=True)
    name = "classifier.1.weight"
    assert state[f"net.{name}"].shape == (1000, 1280)
    assert 0 < (state[f"net.{name}"] - original[name]).abs().max() < 0.1
