"""A trial ends with the weights, bit for bit, that Classifier and SparseUpdate reach under a Trainer."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from microtune.callbacks.int8_training import Int8Training
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.datamodules.digits import Digits
from microtune.datamodules.kept_features import TrunkFeatures
from microtune.modules.classifier import Classifier
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.int8.post_training_quantization import calibrate, quantize_after_training
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.frozen_trunk import cut_network
from microtune.modules.search.short_training import Choice, Int8Update, TrialTraining
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search import trials as trial_setup
from microtune.recipes.search.options import TrialSettings

CLASSES = (0, 1, 2, 3)
SHAPE = (1, 32, 32)
NAME = "mobilenet_v2-w0.35"
BATCH_SIZE = 50  # of 518 samples: ten batches, and one of 18
STEPS_PER_EPOCH = 11
BASE_DEPTH = 12

# Lightning's remarks: few steps per epoch, no workers
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def digits(seed=0):
    data = Digits(classes=CLASSES, resolution=32, batch_size=BATCH_SIZE, seed=seed, augment=True)
    data.setup()
    return data


def trained():
    """A folded network that has learnt a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = mobilenet_v2(0.35, num_classes=len(CLASSES), in_channels=1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    loader = digits().train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network.train()(images), labels).backward()
            optimizer.step()
    return fold_batch_norm(network.eval(), SHAPE)


@pytest.fixture(scope="module")
def network():
    """Where all trials begin."""
    return trained().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def convolutions(network):
    """The names of the network's convolutions."""
    return [convolution.name for convolution in find_operations(network, SHAPE).convolutions]


@pytest.fixture(scope="module")
def schemes(convolutions):
    """Schemes of several kinds."""
    return {
        "classifier": UpdateScheme(NAME, 0),
        "biases": UpdateScheme(NAME, BASE_DEPTH),
        "weights": UpdateScheme(NAME, 8, {convolutions[-6]: 0.5, convolutions[-3]: 1.0, convolutions[-2]: 0.25}),
        "whole depth": UpdateScheme(NAME, BASE_DEPTH, {convolutions[-BASE_DEPTH]: 0.5, convolutions[-1]: 0.125}),
        "channels": UpdateScheme(NAME, 3, {convolutions[-3]: 0.1}, {convolutions[-3]: [0, 7, 55]}),
    }


def fresh_classifier(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Dropout(0), nn.Linear(112, len(CLASSES))).state_dict()


def training_of(network, keep="memory", copies=2, base_depth=BASE_DEPTH, epochs=2, **options):
    """Trials from this network, with the trained networks of the last call in ``trained``."""
    trunk, rest = cut_network(network, find_operations(network, SHAPE), base_depth)
    features = TrunkFeatures(trunk, digits(), copies=copies, keep=keep)
    arguments = {"steps": epochs * STEPS_PER_EPOCH, "batch_size": BATCH_SIZE, "learning_rate": 0.05} | options
    training = TrialTraining(rest, features, fresh_classifier, **arguments)
    training.trained, original = [], training._candidate

    def candidate(*of):
        training.trained.append(original(*of))
        return training.trained[-1]

    training._candidate = candidate
    return training


def by_a_trainer(network, scheme, tmp_path, epochs=2, learning_rate=0.05, warmup_fraction=0.1, seed=0, **choice):
    """What Classifier, SparseUpdate and a Trainer make of the same network."""
    arguments = {"width": 0.35, "num_classes": len(CLASSES), "in_channels": 1, "folded": True}
    module = Classifier(arguments, learning_rate=learning_rate, warmup_fraction=warmup_fraction)
    module.net.load_state_dict(network.state_dict())
    module.net.classifier.load_state_dict(fresh_classifier(seed))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SparseUpdate(scheme, input_shape=SHAPE, seed=seed, **choice)],
        default_root_dir=tmp_path,
    )
    data = digits(seed)
    trainer.fit(module, data)
    assert trainer.global_step == epochs * STEPS_PER_EPOCH
    (val,), (test,) = trainer.validate(module, data, verbose=False), trainer.test(module, data, verbose=False)
    return module.net, (val["val/top1"], test["test/top1"])


def assert_same_rest(trial, whole):
    """Every weight behind the trunk, and as many of them as there are."""
    ours, wanted = trial.state_dict(), whole.state_dict()
    assert set(ours) <= set(wanted)
    for name, value in ours.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("kind", ["classifier", "biases", "weights", "whole depth", "channels"])
def test_weights_are_those_of_a_trainer(kind, network, schemes, tmp_path):
    scheme = schemes[kind]
    training = training_of(network)
    found = training.accuracies_on(("val", "test"), [scheme], seed=0)
    whole, (val_top1, test_top1) = by_a_trainer(network, scheme, tmp_path)
    assert_same_rest(training.trained[0].network, whole)
    assert found == {"val": pytest.approx([val_top1], abs=1e-6), "test": pytest.approx([test_top1], abs=1e-6)}
    assert val_top1 > 0.5
    moved = {
        name for name, value in training.trained[0].network.state_dict().items()
        if not torch.equal(value, network.state_dict()[name])
    }  # fmt: skip
    assert len(moved) == 2 + scheme.bias_depth + len(scheme.weights)


@pytest.mark.parametrize(
    ("keep", "copies", "base_depth"), [("none", 2, BASE_DEPTH), ("memory", 4, 30), ("memory", 2, 51)]
)
def test_they_are_so_wherever_the_trunk_ends_and_whatever_is_kept(keep, copies, base_depth, network, schemes, tmp_path):
    training = training_of(network, keep, copies, base_depth, learning_rate=0.1, warmup_fraction=0.3)
    training.accuracies([schemes["weights"]], seed=0)
    whole, _ = by_a_trainer(network, schemes["weights"], tmp_path, learning_rate=0.1, warmup_fraction=0.3)
    assert_same_rest(training.trained[0].network, whole)


@pytest.mark.parametrize(
    ("criterion", "rechoose_every"),
    [("taylor", 0), ("random", 0), ("loss_decrease", 5), ("weight_norm", 4), ("random", 6)],
)
def test_channels_are_chosen_and_moved_as_by_a_trainer(criterion, rechoose_every, network, convolutions, tmp_path):
    """Once or anew while training, in whichever epoch: the same channels, and the same weights to the bit."""
    scheme = UpdateScheme(NAME, 8, {convolutions[-6]: 0.5, convolutions[-3]: 1.0, convolutions[-2]: 0.25})
    training = training_of(network)
    choice = Choice(criterion, rechoose_every, samples=20)
    training.accuracies_on(("val",), [scheme], seed=0, choice=choice)
    whole, _ = by_a_trainer(
        network, scheme, tmp_path, channel_choice=criterion, rechoose_every=rechoose_every, choice_samples=20
    )
    assert_same_rest(training.trained[0].network, whole)
    training.accuracies_on(("val",), [scheme], seed=0)
    assert (training.trained[0].applied.channels != training.trained[1].applied.channels) == (
        criterion != "weight_norm"
    )


def test_a_diverged_trial_keeps_its_channels(network, convolutions, caplog):
    """There is nothing left to choose by; the accuracy says what became of it, and the log says why."""
    scheme = UpdateScheme(NAME, 8, {convolutions[-6]: 0.5, convolutions[-2]: 0.25})
    training = training_of(network, epochs=1)
    choice = Choice("loss_decrease", 4, samples=50)
    found = training.accuracies_on(("val",), [scheme], seed=0, learning_rate=1e30, choice=choice)
    assert 0 <= found["val"][0] < 0.5
    assert "diverged at learning rate 1e+30" in caplog.text


def test_learning_rate_of_a_call_replaces_that_of_the_trials(network, schemes):
    training, other = training_of(network), training_of(network, learning_rate=0.1)
    training.accuracies_on(("val",), [schemes["biases"]], seed=0, learning_rate=0.1)
    other.accuracies([schemes["biases"]], seed=0)
    assert_same_rest(training.trained[0].network, other.trained[0].network)


def test_splits_are_measured_after_one_training(network, schemes):
    training = training_of(network)
    found = training.accuracies_on(("val", "test"), [schemes["weights"]], seed=1)
    assert len(training.trained) == 1
    assert found == {split: training.accuracies([schemes["weights"]], seed=1, split=split) for split in ("val", "test")}


def test_a_seed_has_its_classifier_and_its_order(network, schemes, tmp_path):
    """Not its augmentation, which is the data module's: hence one without."""
    training = training_of(network, epochs=1, copies=1)
    training.features.data = Digits(classes=CLASSES, resolution=32, batch_size=BATCH_SIZE)
    training.features.data.setup()
    plain = TrunkFeatures(training.features.trunk, training.features.data, copies=1)
    training.features = plain
    top1 = [training.accuracies([schemes["biases"]], seed)[0] for seed in (0, 1, 0)]
    first, second, again = (candidate.network.state_dict() for candidate in training.trained)
    assert top1[0] == top1[2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.1.weight"], second["classifier.1.weight"])


@pytest.mark.parametrize("keep", ["memory", "none"])
def test_schemes_side_by_side_are_as_one_by_one(keep, network, schemes):
    training = training_of(network, keep, epochs=1)
    together = training.accuracies(list(schemes.values()), seed=3)
    alone = [training.accuracies([scheme], seed=3)[0] for scheme in schemes.values()]
    assert together == alone
    assert len(set(alone)) > 1
    for one, other in zip(training.trained[: len(schemes)], training.trained[len(schemes) :], strict=True):
        one, other = one.network.state_dict(), other.network.state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_trials_begin_with_the_same_weights(network, schemes):
    training = training_of(network, epochs=1)
    before = copy.deepcopy(training.rest.state_dict())
    accuracies = [training.accuracies([schemes["whole depth"]], seed=0) for _ in range(2)]
    assert accuracies[0] == accuracies[1]
    assert all(torch.equal(training.rest.state_dict()[name], value) for name, value in before.items())


def test_accuracy_is_the_part_that_is_right(network, schemes):
    training = training_of(network, epochs=1)
    (accuracy,) = training.accuracies([schemes["biases"]], seed=0)
    trained_network = training.trained[0].network.eval()
    features, labels = (torch.cat(parts) for parts in zip(*training.features.evaluation_batches(), strict=True))
    with torch.no_grad():
        correct = (trained_network(features).argmax(1) == labels).sum().item()
    assert accuracy == correct / 58


def test_learning_rate_warms_up_and_ends_near_zero(network, schemes):
    training = training_of(network, epochs=1, warmup_fraction=0.2)
    rates, original = [], training._candidate

    def candidate(*of):
        found = original(*of)
        found.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return found

    training._candidate = candidate
    training.accuracies([schemes["classifier"]], seed=0)
    cosine = [0.05 * 0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
    assert rates == pytest.approx([0.025, 0.05, *cosine])


def test_warmup_fraction_of_a_training_replaces_that_of_the_trials(network, schemes):
    training, other = training_of(network, epochs=1), training_of(network, epochs=1, warmup_fraction=0.5)
    training.train([schemes["biases"]], seed=0, warmup_fraction=0.5)
    other.train([schemes["biases"]], seed=0)
    assert_same_rest(training.trained[0].network, other.trained[0].network)


@pytest.mark.parametrize("base_depth", [BASE_DEPTH, 0])
def test_a_scheme_that_reaches_into_the_trunk_is_refused(base_depth, network, convolutions):
    training = training_of(network, base_depth=base_depth)
    message = (
        f"bias depth {base_depth + 2} reaches into the frozen trunk: give at most {base_depth}, or a larger "
        "--base_depth"
    )
    with pytest.raises(UserError) as refused:
        training.accuracies([UpdateScheme(NAME, 0), UpdateScheme(NAME, base_depth + 2)], seed=0)
    assert str(refused.value) == message


def test_a_trunk_that_ends_at_a_block_allows_the_whole_block(network):
    """The error says how much: training may begin in the middle of a block, the trunk ends before it."""
    training = training_of(network, base_depth=2)
    assert len(training.operations.convolutions) == 3
    training.accuracies([UpdateScheme(NAME, 3)], seed=0)
    with pytest.raises(UserError, match="bias depth 4 reaches into the frozen trunk: give at most 3, or a larger"):
        training.accuracies([UpdateScheme(NAME, 4)], seed=0)


def test_a_diverged_trial_is_said(network, caplog):
    training = training_of(network, epochs=1, learning_rate=1e30)
    training.accuracies([UpdateScheme(NAME, 3)], seed=0)
    assert "a trial with bias depth 3 and 0 weights diverged at learning rate 1e+30" in caplog.text


# ---- int8


@pytest.fixture(scope="module")
def quantized(network):
    """The network in int8."""
    images = torch.cat([images for images, _ in digits().train_dataloader()])
    graph, tensors = quantize_after_training(network, calibrate(network, [images]), "trial-int8")
    found = QuantizedNetwork(graph, len(CLASSES))
    load_quantized_tensors(found, tensors)
    return found.to(memory_format=torch.channels_last)


def linear(seed):
    """The fresh classifier of an int8 network."""
    return {name.removeprefix("1."): value for name, value in fresh_classifier(seed).items()}


@pytest.mark.parametrize("gradient_scaling", [True, False])
@pytest.mark.parametrize("weight_storage", ["in_place", "latent"])
def test_int8_weights_are_those_of_the_callbacks_under_a_trainer(weight_storage, gradient_scaling, quantized, tmp_path):
    """To the bit, in both storages, with and without scaled gradients."""
    operations = find_operations(quantized, SHAPE)
    names = [convolution.name for convolution in operations.convolutions]
    scheme = UpdateScheme("trial-int8", 8, {names[-6]: 0.5, names[-3]: 1.0})
    trunk, rest = cut_network(quantized, operations, BASE_DEPTH)
    features = TrunkFeatures(trunk, digits(), copies=1)
    training = TrialTraining(rest, features, linear, STEPS_PER_EPOCH, BATCH_SIZE, 0.05)
    (trained,) = training.train([scheme], 0, int8_update=Int8Update(weight_storage, gradient_scaling))
    arguments = {"graph": quantized.graph.to_json(), "num_classes": len(CLASSES)}
    module = Classifier(arguments, learning_rate=0.05)
    module.net.load_state_dict(quantized.state_dict() | {f"classifier.{name}": one for name, one in linear(0).items()})
    callbacks = [Int8Training(weight_storage, gradient_scaling, seed=0)]
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SparseUpdate(scheme, input_shape=SHAPE), *callbacks],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, digits())
    assert_same_rest(trained.network, module.net)
    updated = trained.network.state_dict()[f"{names[-3]}.weight"]
    before = quantized.state_dict()[f"{names[-3]}.weight"]
    assert torch.equal(updated, updated.round()) == (weight_storage == "in_place")
    assert torch.equal(updated.round(), before) != gradient_scaling  # without scaling the integers hardly move


# ---- by settings


SETTINGS = TrialSettings("digits", None, {"classes": [0, 1]}, resolution=32, base_depth=6, steps=4, features="none")


@pytest.fixture
def no_memory():
    """Trials are built anew."""
    trial_setup._trials.cache_clear()
    trial_setup._network_and_data.cache_clear()


def test_accuracies_leave_the_global_random_state_alone(network, schemes):
    training = training_of(network, epochs=1)
    state = torch.get_rng_state()
    training.accuracies([schemes["weights"], schemes["biases"]], seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_trials_leave_the_global_random_state_alone(no_memory):
    state = torch.get_rng_state()
    training = trial_setup.trials(SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    training.accuracies([UpdateScheme(NAME, 6)], seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_trials_of_fresh_weights_do_not_depend_on_the_global_random_state(no_memory):
    """Processes that share the work must train one network."""
    first = trial_setup.trials(SETTINGS).rest.state_dict()
    trial_setup._trials.cache_clear()
    trial_setup._network_and_data.cache_clear()
    torch.rand(1)
    second = trial_setup.trials(SETTINGS).rest.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("classifier"))


def test_trials_are_built_once():
    assert trial_setup.trials(SETTINGS) is trial_setup.trials(TrialSettings(**vars(SETTINGS)))


def test_accuracy_is_the_mean_over_seeds(no_memory):
    scheme = UpdateScheme(NAME, 3)
    each = [trial_setup.trials(SETTINGS).accuracies([scheme], seed)[0] for seed in (0, 1)]
    assert trial_setup.fitness(SETTINGS, scheme.to_dict(), seeds=(0, 1)) == sum(each) / 2


def test_a_seed_gives_the_classifier_whatever_was_drawn_before(no_memory):
    """As Classifier draws it after ``torch.manual_seed``."""
    training = trial_setup.trials(SETTINGS)
    first = training.fresh_classifier(7)
    torch.rand(3)
    trial_setup._trials.cache_clear()
    again = trial_setup.trials(SETTINGS).fresh_classifier(7)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == {"1.weight", "1.bias"}
    assert not torch.equal(first["1.weight"], training.fresh_classifier(8)["1.weight"])
