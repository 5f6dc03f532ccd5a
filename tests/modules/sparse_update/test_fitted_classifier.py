"""Promises of the fitted classifier: the lowest loss, nothing else changed, scores of samples that it does not know."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.channel_importance import measure_importance
from microtune.modules.sparse_update.fitted_classifier import L2_PENALTY, fit_classifier, measure_with_fitted_classifier
from microtune.modules.user_error import UserError

SHAPE = (3, 8, 8)


def small_network(bias=True) -> nn.Sequential:
    """Two convolutions and a classifier behind dropout, in float64."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(), nn.Conv2d(8, 5, 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(80, 4, bias=bias)).double()


def batches_of(*counts, shape=SHAPE, classes=4, dtype=torch.float64):
    torch.manual_seed(1)
    return [(torch.randn(count, *shape, dtype=dtype), torch.randint(0, classes, (count,))) for count in counts]


BATCHES = batches_of(16, 16, 8)
OPERATIONS = find_operations(small_network(), SHAPE)


def test_fitted_classifier_has_the_lowest_penalized_loss():
    """Where the gradient is zero: the function is convex."""
    network = small_network()
    top1 = fit_classifier(network, OPERATIONS, BATCHES)
    classifier = network[-1]
    features = torch.cat([network[:-1].eval()(samples) for samples, _ in BATCHES]).detach()
    labels = torch.cat([labels for _, labels in BATCHES])
    loss = F.cross_entropy(classifier(features), labels) + L2_PENALTY * classifier.weight.square().sum()
    for gradient in torch.autograd.grad(loss, [classifier.weight, classifier.bias]):
        assert gradient.abs().max() < 1e-5
    assert loss < 0.9 * math.log(4)
    assert top1 == (classifier(features).argmax(1) == labels).double().mean().item() > 0.5


def test_what_the_classifier_was_does_not_matter():
    weights = []
    for scale in (1.0, 100.0):
        network = small_network()
        with torch.no_grad():
            network[-1].weight.mul_(scale)
        fit_classifier(network, OPERATIONS, BATCHES)
        weights.append(network[-1].weight.detach())
    assert torch.equal(*weights)


def test_without_a_bias():
    network = small_network(bias=False)
    top1 = fit_classifier(network, OPERATIONS, BATCHES)
    with torch.no_grad():
        right = [network.eval()(samples).argmax(1) == labels for samples, labels in BATCHES]
    assert top1 == torch.cat(right).double().mean().item()


@pytest.mark.parametrize("training", [True, False])
def test_only_the_classifier_changes(training):
    network = small_network().train(training)
    network[0].eval()
    network[2].weight.requires_grad_(False)
    before, random_state = copy.deepcopy(network), torch.get_rng_state()
    fit_classifier(network, OPERATIONS, BATCHES)
    assert torch.equal(random_state, torch.get_rng_state())
    for (name, value), old in zip(network.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, old) != name.startswith("5."), name
        assert value.requires_grad == old.requires_grad
        assert value.grad is None
    assert [module.training for module in network.modules()] == [module.training for module in before.modules()]
    assert not network[-1]._forward_pre_hooks


def test_under_no_grad():
    networks = [small_network(), small_network()]
    fit_classifier(networks[0], OPERATIONS, BATCHES)
    with torch.no_grad():
        fit_classifier(networks[1], OPERATIONS, BATCHES)
    assert torch.equal(networks[0][-1].weight, networks[1][-1].weight)


def test_int8_network_has_a_classifier_in_floating_point(small_graph, small_tensors):
    network = QuantizedNetwork(small_graph, 10)
    load_quantized_tensors(network, small_tensors)
    operations = find_operations(network, (3, 32, 32))
    batches = batches_of(20, shape=(3, 32, 32), classes=10, dtype=torch.float32)
    before = copy.deepcopy(network.state_dict())
    top1 = fit_classifier(network, operations, batches)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{operations.classifier_name}.{kind}" for kind in ("weight", "bias")}
    assert top1 > 0.3  # chance is 0.1


def test_no_samples():
    with pytest.raises(UserError, match="fitted to training samples, and there are none: give at least one batch"):
        fit_classifier(small_network(), OPERATIONS, [])


def test_features_that_are_no_numbers():
    network = small_network()
    with torch.no_grad():
        network[0].weight[0] = math.nan
    before = copy.deepcopy(network[-1].state_dict())
    with pytest.raises(UserError, match="in front of the classifier are no finite numbers: give other weights"):
        fit_classifier(network, OPERATIONS, BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in network[-1].state_dict().items())


# ---- scores through it


def test_scores_are_of_the_half_that_the_classifier_was_not_fitted_to():
    network, fitted = small_network(), small_network()
    importance, top1 = measure_with_fitted_classifier(network, OPERATIONS, OPERATIONS.convolutions, BATCHES)
    fit_classifier(fitted, OPERATIONS, BATCHES[:1])
    wanted = measure_importance(fitted, OPERATIONS.convolutions, BATCHES[1:])
    assert importance.samples == wanted.samples == 24
    for criterion in ("loss_decrease", "fisher", "taylor"):
        found = importance.scores(criterion)
        assert all(torch.equal(scores, found[name]) for name, scores in wanted.scores(criterion).items())
    right = [fitted.eval()(samples).argmax(1) == labels for samples, labels in BATCHES[1:]]
    assert top1 == torch.cat(right).double().mean().item()


def test_a_single_batch_does_for_both():
    network, fitted = small_network(), small_network()
    importance, _ = measure_with_fitted_classifier(network, OPERATIONS, OPERATIONS.convolutions, BATCHES[:1])
    fit_classifier(fitted, OPERATIONS, BATCHES[:1])
    wanted = measure_importance(fitted, OPERATIONS.convolutions, BATCHES[:1])
    assert importance.samples == 16
    assert all(
        torch.equal(scores, importance.scores("taylor")[name]) for name, scores in wanted.scores("taylor").items()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_as_it_was(fails, monkeypatch):
    """Whatever happens: the fitted classifier is for the time being."""
    network = small_network().train()
    before = copy.deepcopy(network)
    batches = [*BATCHES[:1], (BATCHES[1][0] * math.nan, BATCHES[1][1])] if fails else BATCHES
    if fails:
        with pytest.raises(UserError, match="the loss is nan"):
            measure_with_fitted_classifier(network, OPERATIONS, OPERATIONS.convolutions, batches)
    else:
        measure_with_fitted_classifier(network, OPERATIONS, OPERATIONS.convolutions, batches)
    for (name, value), old in zip(network.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, old), name
        assert value.requires_grad == old.requires_grad
        assert value.grad is None
    assert [module.training for module in network.modules()] == [module.training for module in before.modules()]
