"""One training step by several methods, which take turns. Times are not tested, for they depend on the machine."""

import pytest
import torch

from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.step_time import interleaved_seconds, prepared, training_step

METHODS = ("full", "published", "freeze", "mask", "sub_tensor")
SCHEMES = {
    "99kb": None,
    "classifier": UpdateScheme("mobilenet_v2-w0.35", 0),
    "biases": UpdateScheme("mobilenet_v2-w0.35", 20),
    "depthwise": UpdateScheme("mobilenet_v2-w0.35", 5, {"features.17.conv.1.0": 0.25, "features.17.conv.2": 1.0}),
}


@pytest.fixture(params=SCHEMES)
def scheme(request, scheme_file):
    return SCHEMES[request.param] or UpdateScheme.load(scheme_file)


@pytest.fixture
def network():
    """A folded network whose gradients are not near 1e-8, as they are without statistics for its batch norm."""
    torch.manual_seed(0)
    unfolded = mobilenet_v2(0.35, num_classes=10)
    unfolded(torch.randn(8, 3, 32, 32))
    return fold_batch_norm(unfolded, (3, 32, 32))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, network, scheme_file):
    """A step changes the classifier and what the scheme updates, and an early layer only under full update."""
    scheme = UpdateScheme.load(scheme_file)
    ready = prepared(network, scheme, find_operations(network, (3, 32, 32)), method)
    before = {name: value.clone() for name, value in ready.network.state_dict().items()}
    samples, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    training_step(ready, samples, labels)()
    changed = {name for name, value in ready.network.state_dict().items() if not torch.equal(value, before[name])}
    assert {"classifier.1.weight", "features.17.conv.0.0.bias", "features.10.conv.0.0.bias"} <= changed
    assert ("features.9.conv.0.0.bias" in changed) is (method == "full")


def test_published_method_trains_as_masks_do(network, scheme):
    """By three steps in double precision, what each changes: computing the other gradients too alters nothing."""
    operations, samples = find_operations(network, (3, 32, 32)), torch.randn(4, 3, 32, 32).double()
    changes = {}
    for method in ("mask", "published"):
        ready = prepared(network.double(), scheme, operations, method)
        step = training_step(ready, samples, torch.tensor([0, 1, 2, 3]))
        for _ in range(3):
            step()
        before, after = network.state_dict(), ready.network.state_dict()
        changes[method] = {name: after[name] - before[name] for name in before}
    assert sum(change.ne(0).any().item() for change in changes["mask"].values()) >= 2  # of the classifier at least
    for name, change in changes["mask"].items():
        torch.testing.assert_close(changes["published"][name], change, rtol=1e-6, atol=1e-12, msg=name)
        assert torch.equal(changes["published"][name] == 0, change == 0), name


def test_published_method_computes_every_gradient(network, scheme):
    operations = find_operations(network, (3, 32, 32))
    ready = prepared(network, scheme, operations, "published")
    training_step(ready, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))()
    gradients = {name: parameter.grad for name, parameter in ready.network.named_parameters()}
    assert len(gradients) == len(list(network.parameters()))
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients["features.0.0.weight"].ne(0).any()  # of a layer that no scheme here updates


def test_methods_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("full", "sub_tensor")}
    seconds = interleaved_seconds(steps, rounds=3, show_progress=False)
    assert calls == ["full", "sub_tensor"] * 5  # two rounds are not timed
    assert {name: len(values) for name, values in seconds.items()} == {"full": 3, "sub_tensor": 3}
