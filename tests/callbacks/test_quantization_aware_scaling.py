"""Promises of quantization-aware scaling: an int8 network takes the steps that it would take in floating point."""

import logging
import warnings
from math import prod

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from microtune.callbacks.int8_weights import Int8Weights
from microtune.callbacks.quantization_aware_scaling import QuantizationAwareScaling
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.int8.graph import (
    InvertedResidual,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
    QuantizedGraph,
)
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

IMAGE, SAMPLES, CLASSES = Quantization(0.0137, 3), 9, 4
LARGEST_BIAS = 2**31 - 2**24
# a grouped, a depthwise and two pointwise layers in part, a depthwise and a pointwise one whole
SCHEME = UpdateScheme(
    "small",
    6,
    {
        "blocks.0.pointwise1": 0.75,
        "blocks.0.depthwise": 0.5,
        "blocks.0.pointwise2": 1.0,
        "blocks.1.depthwise": 1.0,
        "blocks.1.pointwise2": 0.5,
        "feature_mix": 0.34,
    },
    channels={"blocks.0.pointwise1": [0, 1, 3], "blocks.0.depthwise": [0, 2, 3, 7]},
)


def small_graph() -> QuantizedGraph:
    """Seven convolutions for 3 x 6 x 6, of which one is grouped and one padded behind only."""
    last, image = IMAGE, IMAGE

    def convolution(in_channels, out_channels, kernel, output, groups=1, stride=1, padding=None):
        nonlocal last
        pad = padding or (kernel // 2,) * 4
        sizes = (in_channels, out_channels, (kernel, kernel), (stride, stride), pad, groups)
        layer = QuantizedConvolution(*sizes, input=last, output=output)
        last = output
        return layer

    first = convolution(3, 4, 3, Quantization(0.0171, -128), stride=2, padding=(0, 1, 0, 1))
    expand = convolution(4, 8, 1, Quantization(0.0123, -128), groups=2)
    filtered = convolution(8, 8, 3, Quantization(0.0157, -128), groups=8)
    projected = convolution(8, 4, 1, Quantization(0.0231, 5))
    last = total = Quantization(0.0293, -11)
    second = convolution(4, 4, 3, Quantization(0.0189, -128), groups=4)
    narrow = convolution(4, 6, 1, Quantization(0.0311, -4))
    mix = convolution(6, 8, 1, Quantization(0.0217, -128))
    return QuantizedGraph(
        name="small",
        input_shape=(3, 6, 6),
        input=image,
        normalization=None,
        first_conv=first,
        blocks=(InvertedResidual(expand, filtered, projected, total), InvertedResidual(None, second, narrow, None)),
        feature_mix=mix,
        classifier=QuantizedClassifier(8, CLASSES, mix.output, None),
    )


GRAPH = small_graph()
CONVOLUTIONS = dict(GRAPH.convolutions())


def small_tensors(seed=0) -> dict[str, torch.Tensor]:
    """Integers drawn, and scales of which the largest is ten times the smallest."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in CONVOLUTIONS.items():
        scales = 10 ** (torch.rand(layer.out_channels, generator=generator) - 2) / prod(layer.weight_shape[1:]) ** 0.5
        weight = torch.randint(-100, 101, layer.weight_shape, generator=generator)
        bias = 0.3 * torch.randn(layer.out_channels, generator=generator) / (scales * layer.input.scale)
        tensors |= {f"{name}.weight": weight.to(torch.int8), f"{name}.bias": bias.to(torch.int32)}
        tensors[f"{name}.weight_scales"] = scales
    tensors["classifier.weight"] = torch.randn(CLASSES, 8, generator=generator)
    tensors["classifier.bias"] = torch.randn(CLASSES, generator=generator)
    return tensors


class Module(LightningModule):
    """A user's module around an int8 network; it keeps with which gradients it stepped, and where to."""

    def __init__(self, tensors=None, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = QuantizedNetwork(GRAPH)
        load_quantized_tensors(self.net, tensors or small_tensors())
        self.example_input_array = torch.zeros(1, 3, 6, 6)
        self.optimizer, self.options = optimizer, {"lr": 0.02, **options}
        self.gradients, self.states = [], []

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_):
        self.states.append(copy_of_state(self.net))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), **self.options)
        optimizer.register_step_post_hook(lambda *_: self.gradients.append(self.gradients_now()))
        return optimizer

    def gradients_now(self):
        return {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}


def copy_of_state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 3, 6, 6, generator=generator), torch.arange(SAMPLES) % CLASSES


def fit(module, *callbacks, max_epochs=1, batch_size=3, seed=0, **arguments):
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )
    trainer.fit(module, DataLoader(TensorDataset(*samples(seed)), batch_size))
    return module


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        for message in ("does not have many workers", "isinstance.treespec"):
            warnings.filterwarnings("ignore", f".*{message}")
        yield


class FloatNetwork(nn.Module):
    """The same network in real numbers, float64: w = s W and b = s s_x B are its parameters.

    Its forward pass rounds and saturates where a device does, with the gradient passing straight through. How near
    what it rounds comes to a half is noted: float32 might round the other way there.
    """

    def __init__(self, tensors):
        super().__init__()
        self.scales, self.values = {}, nn.ParameterDict()
        for name, layer in CONVOLUTIONS.items():
            weight_scale = tensors[f"{name}.weight_scales"].double()
            scales = {"weight": weight_scale.view(-1, 1, 1, 1), "bias": weight_scale * layer.input.scale}
            for kind, scale in scales.items():
                self.scales[f"{name}.{kind}"] = scale
                self.add(f"{name}.{kind}", tensors[f"{name}.{kind}"].double() * scale)
        for kind in ("weight", "bias"):
            self.add(f"classifier.{kind}", tensors[f"classifier.{kind}"].double())
        self.distance_to_a_half = 1.0

    def add(self, name, value):
        self.values[name.replace(".", "/")] = nn.Parameter(value)

    def __getitem__(self, name):
        return self.values[name.replace(".", "/")]

    def rounded(self, x, low=-torch.inf, high=torch.inf):
        whole = x.detach().round()
        inside = (whole >= low) & (whole <= high)
        matters = x.detach()[(whole >= low - 1) & (whole <= high + 1)]
        distance = (matters - matters.floor() - 0.5).abs()
        self.distance_to_a_half = min([self.distance_to_a_half, *distance.flatten().tolist()])
        return torch.where(inside, x + (whole - x).detach(), whole.clamp(low, high))

    def quantized(self, x, quantization):
        """Real numbers that int8 has."""
        limits = (-128 - quantization.zero_point, 127 - quantization.zero_point)
        return self.rounded(x / quantization.scale, *limits) * quantization.scale

    def convolution(self, name, x):
        layer = CONVOLUTIONS[name]
        weight, bias = (
            self.rounded(self[key] / self.scales[key]) * self.scales[key] for key in (f"{name}.weight", f"{name}.bias")
        )
        sums = F.conv2d(F.pad(x, layer.padding), weight, bias, layer.stride, groups=layer.groups)
        return self.quantized(sums, layer.output)

    def forward(self, x):
        x = self.convolution("first_conv", self.quantized(x.double(), IMAGE))
        for index, block in enumerate(GRAPH.blocks):
            block_input = x
            for part in ("pointwise1", "depthwise", "pointwise2"):
                if getattr(block, part) is not None:
                    x = self.convolution(f"blocks.{index}.{part}", x)
            if block.addition is not None:
                x = self.quantized(block_input + x, block.addition)
        x = self.convolution("feature_mix", x)
        last = GRAPH.classifier.input
        features = self.rounded(x.mean((2, 3)) / last.scale) * last.scale
        return F.linear(features, self["classifier.weight"], self["classifier.bias"])

    def integers(self):
        """What the parameters are in steps of their scales."""
        values = {name.replace("/", "."): value.detach().clone() for name, value in self.values.items()}
        return {name: value / self.scales.get(name, 1.0) for name, value in values.items()}


def updated_entries(scheme, channels):
    """Which entries of which tensor a scheme updates, worked out from its words; all of them without one."""
    shapes = {f"{name}.weight": layer.weight_shape for name, layer in CONVOLUTIONS.items()}
    shapes |= {f"{name}.bias": (layer.out_channels,) for name, layer in CONVOLUTIONS.items()}
    updated = {name: torch.full(shape, scheme is None) for name, shape in shapes.items()}
    updated |= {"classifier.weight": torch.tensor(True), "classifier.bias": torch.tensor(True)}
    if scheme is not None:
        for name in list(CONVOLUTIONS)[len(CONVOLUTIONS) - scheme.bias_depth :]:
            updated[f"{name}.bias"][:] = True
    for name, indexes in channels.items():
        layer = CONVOLUTIONS[name]
        outputs, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        for channel in indexes:
            group, position = divmod(channel, inputs)
            updated[f"{name}.weight"][group * outputs : (group + 1) * outputs, position] = True
    return updated


def steps_in_floating_point(tensors, updated, batches, **options):
    """The integers after training in real numbers."""
    network = FloatNetwork(tensors)
    optimizer = torch.optim.SGD(network.parameters(), **options)
    before = {name: network[name].detach().clone() for name in updated}
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, entries in updated.items():
                network[name].copy_(torch.where(entries, network[name], before[name]))
    # float32 is wrong by a third of that at most; nearer, and the seed would be an unlucky one
    assert network.distance_to_a_half > 1e-4
    return network.integers()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["sub_tensor", "mask", "no scheme"])
def test_three_steps_are_those_of_the_network_in_floating_point(method, options):
    tensors = small_tensors()
    scheme = None if method == "no scheme" else SCHEME
    callbacks = [] if scheme is None else [SparseUpdate(scheme, method=method)]
    module = fit(Module(tensors, **options), *callbacks, QuantizationAwareScaling())
    updated = updated_entries(scheme, {} if scheme is None else callbacks[0].channels)
    x, y = samples()
    batches = zip(x.split(3), y.split(3), strict=True)
    expected = steps_in_floating_point(tensors, updated, batches, lr=0.02, **options)
    state = module.net.state_dict()
    for name, entries in updated.items():
        step, expected_step = (after.double() - tensors[name].double() for after in (state[name], expected[name]))
        assert not step[~entries.expand(step.shape)].any(), name
        if entries.any():
            assert expected_step.abs().max() > (0.02 if name.startswith("classifier") else 0.5), name
            # what float32 can tell of numbers of that size
            atol = 1e-6 * float(state[name].abs().max())
            torch.testing.assert_close(
                step, expected_step, rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )


def with_scales_near_zero(channels: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The integers with channels as published models have them: what they compute is their bias."""
    tensors = small_tensors()
    for name, indexes in channels.items():
        tensors[f"{name}.weight_scales"][indexes] = 4e-9
        tensors[f"{name}.bias"][indexes] = 2**31 - 1
    return tensors


NEAR_ZERO = {"first_conv": [1], "blocks.0.depthwise": [2], "blocks.0.pointwise2": [1], "blocks.1.pointwise2": [0, 4]}


@pytest.mark.parametrize("storage", ["latent", "in_place"])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_weights_on_scales_near_zero_stay_and_their_biases_move_within_32_bits(method, momentum, storage, caplog):
    module = Module(with_scales_near_zero(NEAR_ZERO), momentum=momentum)
    before = copy_of_state(module.net)
    callback = QuantizationAwareScaling()
    with caplog.at_level(logging.INFO):
        fit(module, SparseUpdate(SCHEME, method=method), callback, Int8Weights(storage), max_epochs=3)
    after = module.net.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    moved = []
    for name, indexes in NEAR_ZERO.items():
        weights, weights_before = after[f"{name}.weight"], before[f"{name}.weight"]
        assert torch.equal(weights[indexes], weights_before[indexes])
        assert (name not in SCHEME.weights) == torch.equal(weights, weights_before)
        bias, velocity = before[f"{name}.bias"][indexes], 0
        for state, gradients in zip(module.states, module.gradients, strict=True):
            if name in SCHEME.weights:
                velocity = momentum * velocity + gradients[f"{name}.bias"][indexes]
                bias = (bias - 0.02 * velocity).clamp(-LARGEST_BIAS, LARGEST_BIAS)
            assert (state[f"{name}.bias"][indexes] - bias).abs().max() <= 256  # two steps of such a float32
            assert state[f"{name}.bias"].abs().max() <= LARGEST_BIAS
            moved += (state[f"{name}.bias"] - before[f"{name}.bias"])[indexes].abs().tolist()
    assert max(moved) > 2**24
    # first_conv is not trained
    assert callback.near_zero == {"blocks.0.depthwise": 1, "blocks.0.pointwise2": 1, "blocks.1.pointwise2": 2}
    assert [record.getMessage() for record in caplog.records if "scaling" in record.getMessage()] == [
        "quantization-aware scaling of 12 parameters; the weights of 4 channels with scales near zero get none: "
        "1 of blocks.0.depthwise, 1 of blocks.0.pointwise2, 2 of blocks.1.pointwise2"
    ]


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_weights_on_scales_near_zero_only_decay(method):
    """They get no gradient; weight decay, the optimizer's own, makes all weights smaller."""
    module = Module(with_scales_near_zero(NEAR_ZERO), weight_decay=0.1)
    before = copy_of_state(module.net)
    fit(module, SparseUpdate(SCHEME, method=method), QuantizationAwareScaling(), Int8Weights())
    for name, indexes in NEAR_ZERO.items():
        old, new = before[f"{name}.weight"][indexes], module.net.state_dict()[f"{name}.weight"][indexes]
        assert (new.abs() <= old.abs()).all(), name
        assert (new * old >= 0).all(), name


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_channels_of_a_grouped_layer_are_counted_once(method):
    """Its group has two input channels in the sub-tensor, each with weights of that output."""
    callback = QuantizationAwareScaling()
    tensors = with_scales_near_zero({"blocks.0.pointwise1": [0]})
    fit(Module(tensors), SparseUpdate(SCHEME, method=method), callback, max_epochs=1)
    assert callback.near_zero == {"blocks.0.pointwise1": 1}


def test_without_scales_near_zero_none_are_counted(caplog):
    callback = QuantizationAwareScaling()
    with caplog.at_level(logging.INFO):
        fit(Module(), SparseUpdate(SCHEME), callback)
    assert callback.near_zero == {}
    messages = [record.getMessage() for record in caplog.records if "scaling" in record.getMessage()]
    assert messages == ["quantization-aware scaling of 12 parameters"]


def test_accumulated_gradients_are_scaled_once():
    whole = fit(Module(), SparseUpdate(SCHEME), QuantizationAwareScaling(), batch_size=9)
    parts = fit(Module(), SparseUpdate(SCHEME), QuantizationAwareScaling(), batch_size=3, accumulate_grad_batches=3)
    assert len(whole.gradients) == len(parts.gradients) == 1
    for name, expected in whole.gradients[0].items():
        torch.testing.assert_close(
            parts.gradients[0][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_clipping_is_refused():
    """It would weigh gradients by scales: those of a hundredth of the scale would count ten thousand times as much."""
    with pytest.raises(UserError, match=r"gradients are clipped at 2\.0, .* leave clipping out"):
        fit(Module(), SparseUpdate(SCHEME), QuantizationAwareScaling(), Int8Weights(), gradient_clip_val=2.0)


@pytest.mark.parametrize("callbacks", [(), (Int8Weights(),)])
def test_a_warning_where_weights_are_not_kept_in_range(callbacks, caplog):
    fit(Module(), SparseUpdate(SCHEME), QuantizationAwareScaling(), *callbacks)
    said = [record.getMessage() for record in caplog.records if "Int8Weights" in record.getMessage()]
    expected = "without the callback Int8Weights weights leave the range of int8: add it"
    assert said == ([] if callbacks else [expected])


class TwoOptimizers(Module):
    """Steps by hand with an optimizer each for the classifier with the last biases, and for the rest."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        last = [p for name, p in self.named_parameters() if "classifier" in name or "feature_mix" in name]
        rest = [p for name, p in self.named_parameters() if "classifier" not in name and "feature_mix" not in name]
        return [torch.optim.SGD(parameters, **self.options) for parameters in (last, rest)]


def test_with_two_optimizers_every_gradient_is_scaled_once():
    one, two = (fit(kind(), SparseUpdate(SCHEME), QuantizationAwareScaling()) for kind in (Module, TwoOptimizers))
    for name, expected in one.net.state_dict().items():
        assert torch.equal(two.net.state_dict()[name], expected), name
    assert not torch.equal(one.net.feature_mix.bias, Module().net.feature_mix.bias)


def test_the_same_callbacks_can_train_another_module():
    callbacks = [SparseUpdate(SCHEME), QuantizationAwareScaling()]
    fit(Module(with_scales_near_zero(NEAR_ZERO)), *callbacks)
    again = fit(Module(), *callbacks)
    fresh = fit(Module(), SparseUpdate(SCHEME), QuantizationAwareScaling())
    assert all(torch.equal(tensor, fresh.net.state_dict()[name]) for name, tensor in again.net.state_dict().items())
    assert callbacks[1].near_zero == {}


def test_a_network_elsewhere_in_the_module():
    class Two(Module):
        """Trains two networks, each with its own loss."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Identity(), Module().net)

        def training_step(self, batch, index):
            return super().training_step(batch, index) + F.cross_entropy(self.inner(batch[0]), batch[1])

    callbacks = [QuantizationAwareScaling(), QuantizationAwareScaling("inner.1")]
    assert callbacks[0].state_key != callbacks[1].state_key
    expected = fit(Module(), QuantizationAwareScaling()).net.state_dict()
    without = fit(Module()).net.state_dict()
    for chosen, ends in (([0], (expected, without)), ([1], (without, expected)), ([0, 1], (expected, expected))):
        module = fit(Two(), *(callbacks[index] for index in chosen))
        for network, end in zip((module.net, module.inner[1]), ends, strict=True):
            assert all(torch.equal(tensor, end[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(expected["feature_mix.weight"], without["feature_mix.weight"])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers_than_sgd_are_refused(optimizer):
    name = optimizer.__name__
    message = f"quantization-aware scaling is for SGD, and the optimizer is {name}: use SGD, or leave the callback out"
    with pytest.raises(UserError, match=f"^{message}$"):
        fit(Module(optimizer=optimizer), SparseUpdate(SCHEME), QuantizationAwareScaling())


def test_a_network_without_int8_layers_is_refused():
    module = Module()
    module.net = nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten(), nn.Linear(4, CLASSES))
    message = "quantization-aware scaling is for int8 networks, and this one has no int8 convolution"
    with pytest.raises(UserError, match=f"^{message}$"):
        fit(module, QuantizationAwareScaling())


def test_a_wrong_path_is_named():
    with pytest.raises(UserError, match="there is no network at 'model' in Module: it has net"):
        fit(Module(), QuantizationAwareScaling("model"))
