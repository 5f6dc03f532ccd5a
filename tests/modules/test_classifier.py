"""The classifier: its schedule, its optimizers, its metrics, and what its checkpoints rebuild."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.classifier import Classifier
from microtune.modules.learning_rate import learning_rate_factor
from microtune.modules.networks.batch_norm_folding import find_batch_norm
from microtune.modules.networks.mobilenet_v2 import build_network
from microtune.modules.networks.pretrained_weights import load_weights
from microtune.modules.sparse_update.update_scheme import UpdateScheme

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
FOLDED = {"width": 0.1, "num_classes": 3, "in_channels": 1, "folded": True}
UNFOLDED = {**FOLDED, "folded": False}
SCHEME = UpdateScheme("any", 4, {"features.17.conv.0.0": 0.5, "features.17.conv.2": 1.0})


def loader(classes=3, samples=48, batch_size=8, seed=0):
    """Images with one bright third each, which is their class: separable, and by more than their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    images = 0.3 * torch.randn(samples, 1, 24, 24, generator=generator)
    rows = 24 // classes
    for image, label in zip(images, labels, strict=True):
        image[0, rows * label : rows * (label + 1)] += 2
    return DataLoader(TensorDataset(images, labels), batch_size)


def trainer(epochs, folder=None, **arguments):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=folder is not None and CSVLogger(folder, name="metrics"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


# ---- the schedule


def test_schedule_is_per_step_of_the_optimizer():
    """With accumulated gradients there are fewer steps, and the schedule follows them."""
    rates = []
    module = Classifier(FOLDED, learning_rate=0.1, warmup_fraction=0.25)
    module.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer(2, accumulate_grad_batches=2, limit_val_batches=0).fit(module, loader(batch_size=6))
    assert len(rates) == 8  # two epochs of eight batches, two batches each
    assert rates == pytest.approx([0.1 * learning_rate_factor(step, 2, 8) for step in range(8)])
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert 0 < rates[-1] < 0.01


# ---- the optimizers


def optimizer_of(network, **arguments):
    module = Classifier(network, **arguments)
    module._trainer = module._fabric = None
    module.trainer = SimpleNamespace(estimated_stepping_batches=100)
    return module, module.configure_optimizers()["optimizer"]


@pytest.mark.parametrize("network", [FOLDED, UNFOLDED], ids=["folded", "with batch norm"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_norms_have_no_weight_decay(name, network):
    module, optimizer = optimizer_of(network, optimizer=name, weight_decay=0.01, learning_rate=0.3)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay_of) == len(list(module.parameters()))
    for path, parameter in module.named_parameters():
        is_weight = path.endswith("weight") and parameter.ndim > 1
        assert decay_of[id(parameter)] == (0.01 if is_weight else 0), path
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.3}


def test_optimizer_is_the_one_asked_for():
    _, optimizer = optimizer_of(FOLDED)
    assert type(optimizer) is torch.optim.SGD
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0, 0)}
    _, optimizer = optimizer_of(FOLDED, momentum=0.9)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert type(optimizer_of(FOLDED, optimizer="adamw")[1]) is torch.optim.AdamW


def test_frozen_parameters_are_in_no_group():
    module = Classifier(FOLDED)
    module.net.features.requires_grad_(False)
    module.trainer = SimpleNamespace(estimated_stepping_batches=100)
    optimizer = module.configure_optimizers()["optimizer"]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [tuple(parameter.shape) for parameter in held] == [(3, module.net.classifier[1].in_features), (3,)]


# ---- training and metrics


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_learns_separable_data(name, tmp_path):
    seed_everything(0, verbose=False)
    rate = {"sgd": 0.05, "adamw": 1e-2}[name]
    module = Classifier(UNFOLDED, learning_rate=rate, optimizer=name, momentum=0.9)
    fitted = trainer(15, tmp_path, log_every_n_steps=1)
    fitted.fit(module, loader())
    lines = next(tmp_path.glob("metrics/*/metrics.csv")).read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    losses = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])
    assert fitted.test(module, loader(seed=1), verbose=False)[0]["test/top1"] > 0.7  # chance is 0.33


def test_metrics_are_those_of_the_logits():
    """Top-1, top-5, loss and confusion matrix, over batches of unequal size."""
    module = Classifier({**FOLDED, "num_classes": 8}, label_smoothing=0.1).eval()
    with torch.no_grad():
        module.net.classifier[1].weight.normal_()
        module.net.classifier[1].bias.normal_()
    data = loader(classes=8, samples=50, batch_size=16)
    results = trainer(1).test(module, data, verbose=False)[0]
    images, labels = data.dataset.tensors
    with torch.no_grad():
        logits = module(images)
    predictions = logits.argmax(1)
    assert results["test/top1"] == pytest.approx((predictions == labels).float().mean().item())
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert results["test/top5"] == pytest.approx(in_top5.float().mean().item())
    loss = nn.functional.cross_entropy(logits, labels)  # without the smoothing of training
    assert results["test/loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = torch.zeros(8, 8, dtype=torch.long)
    for actual, predicted in zip(labels, predictions, strict=True):
        expected[actual, predicted] += 1
    assert torch.equal(module.test_confusion, expected)


def test_best_of_equal_logits_is_the_first_of_the_best_five():
    """Those of int8 networks often are; the confusion matrix has the same one."""
    module = Classifier({**FOLDED, "num_classes": 8})
    module.net = nn.Flatten()  # samples are their own logits
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 3, (60, 1, 1, 8), generator=generator).float()
    labels = torch.randint(0, 8, (60,), generator=generator)
    best = samples.flatten(1).topk(5).indices[:, 0]
    assert (best != samples.flatten(1).argmax(1)).any()
    results = trainer(1).test(module, DataLoader(TensorDataset(samples, labels), 16), verbose=False)[0]
    assert results["test/top1"] == pytest.approx((best == labels).float().mean().item())
    expected = torch.zeros(8, 8, dtype=torch.long)
    for actual, predicted in zip(labels, best, strict=True):
        expected[actual, predicted] += 1
    assert torch.equal(module.test_confusion, expected)


def test_confusion_matrix_starts_anew():
    module = Classifier(FOLDED)
    for _ in range(2):
        trainer(1).test(module, loader(), verbose=False)
        assert module.test_confusion.sum() == 48


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True), (10, True)])
def test_top5_only_of_more_than_five_classes(classes, has_top5):
    module = Classifier({**FOLDED, "num_classes": classes})
    results = trainer(1).validate(module, loader(classes=classes), verbose=False)[0]
    assert results.keys() == {"val/loss", "val/top1"} | ({"val/top5"} if has_top5 else set())


def test_network_keeps_its_order_of_memory():
    module = Classifier(FOLDED)
    assert module.net.features[0][0](torch.zeros(2, 1, 24, 24)).is_contiguous(memory_format=torch.channels_last)


# ---- checkpoints


@pytest.mark.parametrize(
    "network",
    [FOLDED, UNFOLDED, {**FOLDED, "padding": "keras"}, {**FOLDED, "head_convolution": True, "in_channels": 3}],
    ids=["folded", "with batch norm", "Keras' padding", "head and colour"],
)
def test_checkpoint_rebuilds_the_network(network, tmp_path):
    images = torch.randn(4, network["in_channels"], 32, 32)
    module = Classifier(network, learning_rate=0.2, optimizer="adamw", weight_decay=0.1)
    module(images)  # statistics for batch norm
    with torch.no_grad():
        module.net.classifier[1].weight.normal_()
    fitter = trainer(1)
    fitter.strategy.connect(module)
    fitter.save_checkpoint(tmp_path / "module.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "module.ckpt")
    assert loaded.hparams == module.hparams
    assert (find_batch_norm(loaded.net) is None) is network["folded"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), module.eval()(images))


def test_checkpoint_of_a_sparse_run_is_a_start_for_another(tmp_path):
    module = Classifier(FOLDED, learning_rate=0.05)
    first = trainer(1, callbacks=[SparseUpdate(SCHEME, input_shape=(1, 24, 24))], limit_val_batches=0)
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["network"] == FOLDED

    other = build_network(**FOLDED)
    load_weights(other, tmp_path / "last.ckpt")
    trained = module.net.state_dict()
    assert other.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in other.state_dict().items())

    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    trainer(1, callbacks=[SparseUpdate(UpdateScheme("any", 1), input_shape=(1, 24, 24))]).fit(loaded, loader())
    changed = {name for name, value in loaded.net.state_dict().items() if not torch.equal(value, trained[name])}
    assert changed == {"features.17.conv.2.bias", "classifier.1.weight", "classifier.1.bias"}


def test_build_network_folds_on_request():
    assert find_batch_norm(build_network(**UNFOLDED)) is not None
    folded = build_network(**FOLDED)
    assert find_batch_norm(folded) is None
    assert folded.features[0][0].bias is not None
    assert not math.isnan(folded(torch.zeros(1, 1, 24, 24)).sum().item())


def test_checkpoint_says_what_the_classes_are(tmp_path):
    module = Classifier(FOLDED, class_names=["bed", "cat", "tree"])
    fitter = trainer(1)
    fitter.strategy.connect(module)
    fitter.save_checkpoint(tmp_path / "module.ckpt")
    assert Classifier.load_from_checkpoint(tmp_path / "module.ckpt").hparams.class_names == ["bed", "cat", "tree"]
    assert Classifier(FOLDED).hparams.class_names is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_samples_are_taken_in_the_network_s_own_precision(dtype):
    module = Classifier(FOLDED).to(dtype).eval()
    samples = torch.randn(2, 1, 24, 24)
    assert module(samples).dtype == dtype
    assert torch.equal(module(samples), module(samples.to(dtype)))
