"""Promises of Int8Training: an int8 network takes the steps that it would take in floating point, from integers to
integers that a device can hold, and a run can be resumed.
"""

import logging
from math import prod

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from microtune.callbacks.int8_training import Int8Training
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.int8.graph import (
    InvertedResidual,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
    QuantizedGraph,
)
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors, quantized_tensors
from microtune.modules.int8.stochastic_rounding import IntegerGenerator, round_stochastically
from microtune.modules.sparse_update.subtensor import by_input_channel
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

METHODS, STORAGES = ["sub_tensor", "mask"], ["latent", "in_place"]
IMAGE, SAMPLES, CLASSES = Quantization(0.0137, 3), 9, 4
LARGEST_BIAS = 2**31 - 2**24
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}
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
    """A user's module around an int8 network; it keeps with which gradients it stepped, where from and where to."""

    def __init__(self, tensors=None, optimizer=torch.optim.SGD, classifier_rate=None, lr=0.02, **options):
        super().__init__()
        self.net = QuantizedNetwork(GRAPH)
        load_quantized_tensors(self.net, tensors or small_tensors())
        self.example_input_array = torch.zeros(1, 3, 6, 6)
        self.optimizer, self.options = optimizer, {"lr": lr, **options}
        self.classifier_rate = classifier_rate or lr
        self.gradients, self.losses, self.states = [], [], []

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_start(self):
        self.states.append(copy_of_state(self.net))

    def on_train_batch_end(self, *_):
        self.states.append(copy_of_state(self.net))

    def configure_optimizers(self):
        last = list(self.net.classifier.parameters())
        rest = [p for name, p in self.named_parameters() if not name.startswith("net.classifier.")]
        groups = [{"params": rest}, {"params": last, "lr": self.classifier_rate}]
        optimizer = self.optimizer(groups, **self.options)
        optimizer.register_step_post_hook(lambda *_: self.gradients.append(self.gradients_now()))
        return optimizer

    def gradients_now(self):
        return {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}


def copy_of_state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(states, expected):
    assert list(states) == list(expected)
    assert all(torch.equal(states[name], tensor) for name, tensor in expected.items())


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 3, 6, 6, generator=generator), torch.arange(SAMPLES) % CLASSES


def fit(module, *callbacks, max_epochs=1, batch_size=3, ckpt_path=None, **arguments):
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **arguments,
    )
    trainer.fit(module, DataLoader(TensorDataset(*samples()), batch_size), ckpt_path=ckpt_path)
    return module


def callbacks_for(storage, method="sub_tensor", **options):
    """What trains an int8 network; every layer whole where there is no method."""
    return [*([SparseUpdate(SCHEME, method=method)] if method else []), Int8Training(storage, **options)]


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


# ---- before the step: gradients


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
@pytest.mark.parametrize("method", [*METHODS, None])
def test_three_steps_are_those_of_the_network_in_floating_point(method, options):
    tensors = small_tensors()
    callbacks = callbacks_for(None, method)
    module = fit(Module(tensors, **options), *callbacks)
    updated = updated_entries(SCHEME, callbacks[0].channels) if method else updated_entries(None, {})
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


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_weights_on_scales_near_zero_stay_and_their_biases_move_within_32_bits(method, momentum, storage, caplog):
    module = Module(with_scales_near_zero(NEAR_ZERO), momentum=momentum)
    before = copy_of_state(module.net)
    callbacks = callbacks_for(storage, method)
    with caplog.at_level(logging.INFO):
        fit(module, *callbacks, max_epochs=3)
    after = module.net.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    moved = []
    for name, indexes in NEAR_ZERO.items():
        weights, weights_before = after[f"{name}.weight"], before[f"{name}.weight"]
        assert torch.equal(weights[indexes], weights_before[indexes])
        assert (name not in SCHEME.weights) == torch.equal(weights, weights_before)
        bias, velocity = before[f"{name}.bias"][indexes], 0
        for state, gradients in zip(module.states[1:], module.gradients, strict=True):
            if name in SCHEME.weights:
                velocity = momentum * velocity + gradients[f"{name}.bias"][indexes]
                bias = (bias - 0.02 * velocity).clamp(-LARGEST_BIAS, LARGEST_BIAS)
            assert (state[f"{name}.bias"][indexes] - bias).abs().max() <= 256  # two steps of such a float32
            assert state[f"{name}.bias"].abs().max() <= LARGEST_BIAS
            moved += (state[f"{name}.bias"] - before[f"{name}.bias"])[indexes].abs().tolist()
    assert max(moved) > 2**24
    # first_conv is not trained
    assert callbacks[-1].near_zero == {"blocks.0.depthwise": 1, "blocks.0.pointwise2": 1, "blocks.1.pointwise2": 2}
    assert [record.getMessage() for record in caplog.records if "scaling" in record.getMessage()] == [
        "quantization-aware scaling of 12 parameters; the weights of 4 channels with scales near zero get none: "
        "1 of blocks.0.depthwise, 1 of blocks.0.pointwise2, 2 of blocks.1.pointwise2"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_weights_on_scales_near_zero_only_decay(method):
    """They get no gradient; weight decay, the optimizer's own, makes all weights smaller."""
    module = Module(with_scales_near_zero(NEAR_ZERO), weight_decay=0.1)
    before = copy_of_state(module.net)
    fit(module, *callbacks_for("in_place", method))
    for name, indexes in NEAR_ZERO.items():
        old, new = before[f"{name}.weight"][indexes], module.net.state_dict()[f"{name}.weight"][indexes]
        assert (new.abs() <= old.abs()).all(), name
        assert (new * old >= 0).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_channels_of_a_grouped_layer_are_counted_once(method):
    """Its group has two input channels in the sub-tensor, each with weights of that output."""
    callbacks = callbacks_for(None, method)
    fit(Module(with_scales_near_zero({"blocks.0.pointwise1": [0]})), *callbacks)
    assert callbacks[-1].near_zero == {"blocks.0.pointwise1": 1}


def test_without_scales_near_zero_none_are_counted(caplog):
    callbacks = callbacks_for("in_place")
    with caplog.at_level(logging.INFO):
        fit(Module(), *callbacks)
    assert callbacks[-1].near_zero == {}
    messages = [record.getMessage() for record in caplog.records if "scaling" in record.getMessage()]
    assert messages == ["quantization-aware scaling of 12 parameters"]


def test_accumulated_gradients_are_scaled_once():
    whole = fit(Module(), *callbacks_for(None), batch_size=9)
    parts = fit(Module(), *callbacks_for(None), batch_size=3, accumulate_grad_batches=3)
    assert len(whole.gradients) == len(parts.gradients) == 1
    for name, expected in whole.gradients[0].items():
        torch.testing.assert_close(
            parts.gradients[0][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


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
    one, two = (fit(kind(), *callbacks_for("latent")) for kind in (Module, TwoOptimizers))
    assert_same_state(two.net.state_dict(), one.net.state_dict())
    assert not torch.equal(one.net.feature_mix.bias, Module().net.feature_mix.bias)


# ---- after the step: integers


def integers(state):
    """Weights and biases of the convolutions."""
    kinds = (".weight", ".bias")
    return {name: t for name, t in state.items() if name.endswith(kinds) and not name.startswith("classifier.")}


def is_whole(state):
    return all((tensor == tensor.round()).all() for tensor in integers(state).values())


def assert_in_range(state):
    for name, tensor in integers(state).items():
        low, high = (-128, 127) if name.endswith(".weight") else (-LARGEST_BIAS, LARGEST_BIAS)
        assert low <= tensor.min(), name  # false of NaN too
        assert tensor.max() <= high, name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", [*METHODS, None])
def test_after_every_step_integers_are_in_their_range_however_large_it_was(method, storage):
    module = Module(lr=1e7, classifier_rate=0.01, momentum=0.5)
    fit(module, *callbacks_for(storage, method))
    assert len(module.states) == 4
    for state in module.states:
        assert_in_range(state)
    last = module.states[-1]
    assert last["blocks.0.pointwise2.weight"].min() == -128
    assert last["blocks.0.pointwise2.weight"].max() == 127
    assert last["feature_mix.bias"].abs().max() == LARGEST_BIAS
    assert all(tensor.isfinite().all() for tensor in last.values())


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_trained_starts_in_its_range_too(storage):
    """Networks that the paper's code trained have larger weights."""
    module = Module()
    with torch.no_grad():
        module.net.blocks[0].pointwise2.weight[0, 0] = 225
        module.net.blocks[0].pointwise2.weight[1, 0] = -225
        module.net.blocks[0].pointwise2.bias[0] = 2**31
    before = copy_of_state(module.net)
    fit(module, *callbacks_for(storage))
    start = module.states[0]
    assert start["blocks.0.pointwise2.weight"][:2, 0].flatten().tolist() == [127, -128]
    assert start["blocks.0.pointwise2.bias"][0] == LARGEST_BIAS
    assert_in_range(start)
    changed = {name: (tensor != before[name]).sum().item() for name, tensor in start.items()}
    assert {name: count for name, count in changed.items() if count} == {
        "blocks.0.pointwise2.weight": 2,
        "blocks.0.pointwise2.bias": 1,
    }


@pytest.mark.parametrize("method", METHODS)
def test_in_place_integers_are_whole_at_every_moment_and_frozen_ones_stay(method):
    module = Module(**MOMENTUM)
    callbacks = callbacks_for("in_place", method)
    fit(module, *callbacks, max_epochs=2)
    assert len(module.states) == 7
    first, last = module.states[0], module.states[-1]
    assert all(is_whole(state) for state in module.states)
    for name, entries in updated_entries(SCHEME, callbacks[0].channels).items():
        updated = entries.expand(first[name].shape)
        assert all(torch.equal(state[name][~updated], first[name][~updated]) for state in module.states), name
        if updated.any():
            assert (last[name] != first[name])[updated].float().mean() > 0.1, name


def test_latent_copies_are_not_rounded_and_the_network_computes_with_rounded_ones():
    module = fit(Module(**MOMENTUM), *callbacks_for("latent"))
    assert not is_whole(module.states[1])
    state = module.net.state_dict()
    rounded = QuantizedNetwork(GRAPH)
    rounded.load_state_dict({**state, **{name: tensor.round() for name, tensor in integers(state).items()}})
    x, _ = samples(seed=1)
    with torch.no_grad():
        assert torch.equal(module.net(x), rounded(x))
    _, tensors = quantized_tensors(module.net)
    assert all(torch.equal(tensors[name].float(), t) for name, t in integers(rounded.state_dict()).items())


def test_in_place_steps_below_a_half_are_not_lost():
    latent, in_place = (fit(Module(lr=8e-4), *callbacks_for(storage)) for storage in STORAGES)  # the same first step
    step, taken = (
        torch.cat([(states[1][name] - states[0][name]).flatten() for name in integers(states[0])])
        for states in (latent.states, in_place.states)
    )
    small = (step != 0) & (step.abs() < 0.5)
    step, taken = step[small], taken[small]
    assert (step.abs() > 0.1).sum() > 20
    assert taken.abs().max() == 1
    assert ((taken == 0) | (taken == step.sign())).all()
    deviation = (step.abs() * (1 - step.abs())).sum().sqrt()  # of the sum of steps, by the variance of each
    assert (taken.sum() - step.sum()).abs() < 4 * deviation


@pytest.mark.parametrize("method", METHODS)
def test_in_place_integers_are_rounded_in_forward_order_as_documented(method):
    """A device draws in this order too, and has the same integers after the same step."""
    scheme = UpdateScheme("small", 6, dict.fromkeys(SCHEME.weights, 1.0)) if method == "mask" else SCHEME
    stepped, rounded = Module(**MOMENTUM), Module(**MOMENTUM)
    sparse = SparseUpdate(scheme, method=method)
    fit(stepped, sparse, Int8Training(None))  # without limits: these come after rounding
    fit(rounded, SparseUpdate(scheme, method=method), Int8Training(seed=11))
    generator = IntegerGenerator(11)
    for layer in list(CONVOLUTIONS)[1:]:
        weights = [module.states[1][f"{layer}.weight"] for module in (stepped, rounded)]
        if method == "sub_tensor":
            groups = CONVOLUTIONS[layer].groups
            weights = [by_input_channel(weight, groups).flatten(0, 1)[sparse.channels[layer]] for weight in weights]
        assert torch.equal(weights[1], round_stochastically(weights[0], generator).clamp(-128, 127)), layer
        biases = [module.states[1][f"{layer}.bias"] for module in (stepped, rounded)]
        assert torch.equal(biases[1], round_stochastically(biases[0], generator)), layer


def test_integers_are_drawn_for_once_per_step_of_the_optimizer():
    *_, callback = callbacks = callbacks_for("in_place", seed=5)
    fit(Module(), *callbacks, accumulate_grad_batches=2, max_epochs=3)
    trained = 3 * 4 + 4 * 9 + 8 * 4 + 4 * 9 + 2 * 6 + 2 * 8 + (8 + 8 + 4 + 4 + 6 + 8)
    assert callback.generator.state == (5 + 0x9E3779B9 * trained * 6) % 2**32
    assert callback.parameters == []  # let go of


def test_the_seed_decides_and_latent_copies_draw_nothing():
    def last_state(*arguments, **options):
        return fit(Module(**MOMENTUM), *callbacks_for(*arguments, **options)).states[-1]

    first, same, other = (last_state("in_place", seed=seed) for seed in (1, 1, 2))
    assert_same_state(first, same)
    assert not torch.equal(first["blocks.0.pointwise2.weight"], other["blocks.0.pointwise2.weight"])
    assert_same_state(*(last_state("latent", seed=seed) for seed in (1, 2)))
    *_, latent = callbacks = callbacks_for("latent", seed=5)
    fit(Module(), *callbacks)
    assert latent.generator.state == 5


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_callbacks_is_free(method, storage):
    expected = fit(Module(**MOMENTUM), *callbacks_for(storage, method))
    assert_same_state(
        fit(Module(**MOMENTUM), *reversed(callbacks_for(storage, method))).states[-1], expected.states[-1]
    )


def test_mask_and_sub_tensor_reach_the_same_weights():
    modules = [fit(Module(**MOMENTUM), *callbacks_for("latent", method), max_steps=2) for method in METHODS]
    assert len(modules[0].states) == 3
    for name, expected in modules[1].net.state_dict().items():
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(modules[0].net.state_dict()[name], expected, rtol=1e-4, atol=atol)
    name = "blocks.0.depthwise.weight"
    assert (modules[0].states[-1][name] - modules[0].states[0][name]).abs().max() > 1


def test_evaluation_changes_nothing():
    class Evaluated(Callback):
        """Evaluates between two batches."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            before = copy_of_state(pl_module.net)
            with torch.no_grad():
                pl_module.net(torch.zeros(1, 3, 6, 6))
            assert_same_state(copy_of_state(pl_module.net), before)

    module = fit(Module(), *callbacks_for("in_place"), Evaluated())
    assert len(module.states) == 4


# ---- one without the other, and several


def test_without_scaling_gradients_are_those_of_the_loss_and_integers_stay_in_range(caplog):
    scaled, plain, without = Module(), Module(), Module()
    for module, callbacks in (
        (scaled, [Int8Training()]),
        (plain, [Int8Training(gradient_scaling=False)]),
        (without, []),
    ):
        with caplog.at_level(logging.INFO):
            caplog.clear()
            fit(module, *callbacks)
        assert ("quantization-aware scaling" in caplog.text) is (module is scaled)
    for name, expected in without.gradients[0].items():
        assert torch.equal(plain.gradients[0][name], expected)
        assert torch.equal(scaled.gradients[0][name], expected) is name.startswith("classifier."), name
    assert is_whole(plain.net.state_dict())
    assert_in_range(plain.net.state_dict())
    assert not is_whole(without.net.state_dict())


@pytest.mark.parametrize("storage", [None, "latent"])
def test_a_warning_where_weights_are_not_kept_in_range(storage, caplog):
    fit(Module(), *callbacks_for(storage))
    said = [record.getMessage() for record in caplog.records if "range" in record.getMessage()]
    assert said == (["weight_storage is None: weights leave the range of int8"] if storage is None else [])


def test_the_same_callbacks_can_train_another_module():
    callbacks = callbacks_for("latent")
    fit(Module(with_scales_near_zero(NEAR_ZERO)), *callbacks)
    again = fit(Module(), *callbacks)
    assert_same_state(again.net.state_dict(), fit(Module(), *callbacks_for("latent")).net.state_dict())
    assert callbacks[1].near_zero == {}


def test_several_networks_of_a_module(tmp_path):
    class Two(Module):
        """Trains two networks, each with its own loss."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Identity(), Module().net)

        def training_step(self, batch, index):
            return super().training_step(batch, index) + F.cross_entropy(self.inner(batch[0]), batch[1])

    expected = fit(Module(), Int8Training(seed=3)).net.state_dict()
    without = fit(Module()).net.state_dict()
    for paths, ends in (
        (["net"], (expected, without)),
        (["inner.1"], (without, expected)),
        (["net", "inner.1"], (expected, expected)),
    ):
        module = fit(Two(), *(Int8Training(seed=3, network=path) for path in paths))
        for network, end in zip((module.net, module.inner[1]), ends, strict=True):
            assert_same_state(network.state_dict(), end)
    assert not torch.equal(expected["feature_mix.weight"], without["feature_mix.weight"])
    assert Int8Training().state_key != Int8Training(network="inner.1").state_key
    assert Int8Training("latent").state_key == Int8Training("in_place").state_key  # so that the other is refused


# ---- a run that is resumed


def fit_with_checkpoints(folder, module, *callbacks, max_epochs=2, **arguments):
    fit(module, *callbacks, ModelCheckpoint(folder, "{epoch}", save_top_k=-1), max_epochs=max_epochs, **arguments)
    return [folder / f"epoch={epoch}.ckpt" for epoch in range(max_epochs)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one_and_its_checkpoints_are_plain(tmp_path, method, storage):
    whole, callbacks = Module(**MOMENTUM), callbacks_for(storage, method, seed=3)
    first, last = fit_with_checkpoints(tmp_path / "whole", whole, *callbacks)
    resumed = Module(**MOMENTUM)
    fit_with_checkpoints(tmp_path / "resumed", resumed, *callbacks_for(storage, method, seed=4), ckpt_path=first)
    assert len(whole.states) == 7
    assert len(resumed.states) == 4
    for state, expected in zip(resumed.states, whole.states[3:], strict=True):
        assert_same_state(state, expected)
    assert whole.losses[3:] == resumed.losses
    assert not torch.equal(whole.states[3]["blocks.0.depthwise.weight"], whole.states[6]["blocks.0.depthwise.weight"])

    checkpoint = torch.load(last, weights_only=True)
    state = callbacks[-1].generator.state
    assert checkpoint["callbacks"][callbacks[-1].state_key] == {"weight_storage": storage, "generator": state}
    assert (state == 3) == (storage == "latent")
    plain = QuantizedNetwork(GRAPH)
    plain.load_state_dict({name.removeprefix("net."): tensor for name, tensor in checkpoint["state_dict"].items()})
    assert_same_state(plain.state_dict(), whole.net.state_dict())
    assert is_whole(plain.state_dict()) == (storage == "in_place")


@pytest.mark.parametrize(
    ("storage", "other", "said"),
    [("latent", "in_place", "latent"), ("in_place", "latent", "in_place"), (None, "in_place", "unlimited")],
)
def test_resuming_with_another_storage_is_refused(tmp_path, storage, other, said):
    first, _ = fit_with_checkpoints(tmp_path, Module(), *callbacks_for(storage))
    message = f"the checkpoint was trained with {said} weights: resume with these, or start anew"
    with pytest.raises(UserError, match=f"^{message}$"):
        fit(Module(), *callbacks_for(other), max_epochs=2, ckpt_path=first)


def test_resuming_what_the_callbacks_before_this_one_made_is_refused(tmp_path):
    first, _ = fit_with_checkpoints(tmp_path, Module(), *callbacks_for("in_place"))
    checkpoint = torch.load(first, weights_only=True)
    del checkpoint["callbacks"][Int8Training().state_key]
    checkpoint["callbacks"]["Int8Weights{'network': 'net'}"] = {"storage": "in_place", "generator": 7}
    torch.save(checkpoint, first)
    with pytest.raises(
        UserError, match=r"^the checkpoint was made with Int8Weights, which Int8Training has replaced: "
    ):
        fit(Module(), *callbacks_for("in_place"), max_epochs=2, ckpt_path=first)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_storage": "inplace"}, "weight_storage is 'inplace': give one of latent, in_place, or None"),
        (
            {"weight_storage": None, "gradient_scaling": False},
            "weight_storage is None and gradient_scaling False: nothing is left to do",
        ),
    ],
)
def test_unknown_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        Int8Training(**arguments)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers_than_sgd_are_refused_where_gradients_are_scaled(optimizer):
    name = optimizer.__name__
    message = f"quantization-aware scaling is for SGD, and the optimizer is {name}: use SGD, or gradient_scaling=False"
    with pytest.raises(UserError, match=f"^{message}$"):
        fit(Module(optimizer=optimizer), *callbacks_for("in_place"))
    fit(Module(optimizer=optimizer), *callbacks_for("in_place", gradient_scaling=False), max_steps=1)


def test_clipping_is_refused_where_gradients_are_scaled():
    """It would weigh gradients by scales: those of a hundredth of the scale would count ten thousand times as much."""
    with pytest.raises(UserError, match=r"gradients are clipped at 2\.0, .* leave clipping out"):
        fit(Module(), *callbacks_for("in_place"), gradient_clip_val=2.0)
    fit(Module(), *callbacks_for("in_place", gradient_scaling=False), gradient_clip_val=2.0, max_steps=1)


@pytest.mark.parametrize("options", [{"weight_storage": None}, {"gradient_scaling": False}], ids=str)
def test_a_network_without_int8_layers_is_refused(options):
    module = Module()
    module.net = nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten())
    module.net.classifier = nn.Linear(4, CLASSES)
    message = "there are no int8 weights: the network has no int8 convolution; leave Int8Training out"
    with pytest.raises(UserError, match=f"^{message}$"):
        fit(module, Int8Training(**options))


def test_a_wrong_path_is_named():
    with pytest.raises(UserError, match="there is no network at 'model' in Module: it has net"):
        fit(Module(), Int8Training(network="model"))
