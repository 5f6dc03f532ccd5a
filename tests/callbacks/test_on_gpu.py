"""Promises of training on a GPU: the same as on a CPU. Run where there is one: ``pytest -m gpu``."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from microtune.callbacks.int8_training import Int8Training
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.memory.saved_for_backward import measure_saved_bytes
from microtune.modules.memory.training_memory import autograd_bytes_per_sample
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme

pytestmark = pytest.mark.gpu

GPU = "cuda"
SIZE = 32
# a grouped, a depthwise and a pointwise layer in part; the first convolution is frozen
SCHEME = UpdateScheme("small", 3, {"2": 0.5, "4": 0.25, "6": 0.5})
INT8_SCHEME = UpdateScheme("small-int8", 5, {"blocks.1.pointwise2": 0.5, "blocks.2.depthwise": 0.25})


@pytest.fixture(autouse=True)
def _full_float32():
    """Otherwise convolutions of newer GPUs round their inputs to 10 bits, unlike a CPU's."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


class Module(LightningModule):
    """A user's module, which keeps the losses and the network's state after every step, on the CPU."""

    def __init__(self, net, learning_rate=0.1):
        super().__init__()
        self.net, self.learning_rate = net, learning_rate
        self.example_input_array = torch.zeros(1, 3, SIZE, SIZE)
        self.losses, self.states = [], []

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_):
        self.states.append(state_of(self.net))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=0.01)


def state_of(network):
    return {name: tensor.cpu().clone() for name, tensor in network.state_dict().items()}


def small_network():
    """The same weights at every call, large enough that eight steps teach it something."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1, groups=2),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 1),
        nn.AvgPool2d(16),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        for layer in network[:7:2]:
            layer.weight.mul_(3)
    return network


def fit(module, *callbacks, device=GPU, **arguments):
    """8 steps over 32 samples of 4 classes, in the same order on every device."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    x = torch.randn(32, 3, SIZE, SIZE, generator=generator) / 2 + torch.randn(4, 3, 1, 1, generator=generator)[y]
    trainer = Trainer(
        accelerator=device,
        devices=1,
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), 8))
    return module


def assert_rest_is_frozen(before, module, channels, groups_of):
    """Weights of convolutions changed in their updated channels, after every step, and were bit-equal elsewhere."""
    for name, first in before.items():
        layer = name.removesuffix(".weight")
        if first.ndim != 4:
            continue
        updated = torch.zeros_like(first, dtype=torch.bool)
        outputs = len(first) // groups_of.get(layer, 1)
        for channel in channels.get(layer, ()):
            group, position = divmod(channel, first.shape[1])
            updated[group * outputs : (group + 1) * outputs, position] = True
        assert all(torch.equal(state[name][~updated], first[~updated]) for state in module.states), name
        assert not updated.any() or not torch.equal(module.states[-1][name][updated], first[updated]), name


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_frozen_slices_are_bit_equal_and_losses_are_those_of_a_cpu(method):
    before, modules = small_network().state_dict(), {}
    for device in ("cpu", GPU):
        callback = SparseUpdate(SCHEME, method=method)
        modules[device] = fit(Module(small_network()), callback, device=device)
        assert_rest_is_frozen(before, modules[device], callback.channels, {"2": 2, "4": 16})
    torch.testing.assert_close(modules[GPU].losses, modules["cpu"].losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_bfloat16_autocast(method):
    before, callback = small_network().state_dict(), SparseUpdate(SCHEME, method=method)
    module = fit(Module(small_network()), callback, precision="bf16-mixed")
    assert_rest_is_frozen(before, module, callback.channels, {"2": 2, "4": 16})
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])


def test_channels_chosen_by_data_and_anew():
    callback = SparseUpdate(SCHEME, channel_choice="taylor", rechoose_every=3, choice_samples=16)
    module = fit(Module(small_network()), callback)
    assert callback.moved_channels > 0
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    assert torch.equal(module.states[-1]["0.weight"], small_network().state_dict()["0.weight"])


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_int8_weights_in_place_are_integers_in_their_range(small_graph, small_tensors, method):
    modules = {}
    for device in ("cpu", GPU):
        network = QuantizedNetwork(small_graph)
        load_quantized_tensors(network, small_tensors)
        before, sparse = state_of(network), SparseUpdate(INT8_SCHEME, method=method)
        modules[device] = fit(Module(network, learning_rate=0.02), sparse, Int8Training("in_place"), device=device)
        assert_rest_is_frozen(before, modules[device], sparse.channels, {"blocks.2.depthwise": 24})
    for state in modules[GPU].states:
        for name, tensor in state.items():
            if name.endswith((".weight", ".bias")) and not name.startswith("classifier."):
                limit = 128 if name.endswith(".weight") else 2**31
                assert torch.equal(tensor, tensor.round()), name
                assert -limit <= tensor.min(), name
                assert tensor.max() < limit, name
    # before the first step: samples at the edge between two integers may fall on the other side
    torch.testing.assert_close(modules[GPU].losses[0], modules["cpu"].losses[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
def test_saved_bytes_are_those_of_the_account(ratio):
    shape, batch_size = (3, 64, 64), 2
    network = fold_batch_norm(mobilenet_v2(0.35, num_classes=10), shape)
    operations = find_operations(network, shape)
    inside = operations.convolutions[-9:]
    scheme = UpdateScheme("x", len(inside), {c.name: ratio for c in inside} if ratio else {})
    channels = {c.name: list(range(scheme.updated_channels(c))) for c in inside if ratio}
    AppliedScheme(network, scheme, operations, channels)
    measured = measure_saved_bytes(network.to(GPU), torch.randn(batch_size, *shape, device=GPU))
    assert measured == autograd_bytes_per_sample(operations, scheme) * batch_size
