"""Promises of SparseUpdate in anyone's Trainer."""

import copy
import logging
import os
import shutil
import signal
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.sparse_update.subtensor import MaskedReLU, SubTensorConv2d
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

METHODS = ["sub_tensor", "mask"]
CHOICES = {"once": {}, "anew": {"channel_choice": "taylor", "rechoose_every": 3, "choice_samples": 16}}
TWO_PROCESSES = [("sub_tensor", "once"), ("mask", "once"), ("sub_tensor", "anew")]
SCHEME = UpdateScheme("block", 4, {"expand.0": 0.5, "depthwise.0": 0.25, "project": 1.0, "head.0": 0.5})


class BlockNet(nn.Module):
    """An inverted residual block between two ordinary convolutions, the second one grouped."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(inplace=True))
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.ReLU())
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.classifier(self.head(x).mean((2, 3)))


class Module(LightningModule):
    """A user's module around a network."""

    def __init__(self, net=None, optimizer="sgd"):
        super().__init__()
        self.net = net or BlockNet()
        self.optimizer = optimizer
        self.example_input_array = torch.zeros(1, 3, 8, 8)
        self.losses = []

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def batches(batch_size=8):
    """The same 32 samples in the same order in every epoch, of classes that can be learned."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    x = torch.randn(32, 3, 8, 8, generator=generator) + 2 * torch.randn(4, 3, 8, 8, generator=generator)[y]
    return DataLoader(TensorDataset(x, y), batch_size)


def trainer(*callbacks, max_epochs=2, **arguments):
    arguments = {"enable_checkpointing": False, "accelerator": "cpu", **arguments}
    return Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def new_module(seed=0, **arguments):
    torch.manual_seed(seed)
    return Module(**arguments)


def copy_of_state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def updated_entries(state, channels, scheme=SCHEME):
    """Which entries of which tensor the scheme updates, worked out from its words."""
    layers = ["stem.0", "expand.0", "depthwise.0", "project", "head.0"]
    updated = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in state.items()}
    for name in ["classifier.weight", "classifier.bias"] + [f"{x}.bias" for x in layers[5 - scheme.bias_depth :]]:
        updated[name][:] = True
    for name, indexes in channels.items():
        weight, groups = updated[f"{name}.weight"], {"depthwise.0": 16, "head.0": 2}.get(name, 1)
        outputs = len(weight) // groups
        for channel in indexes:
            group, position = divmod(channel, weight.shape[1])
            weight[group * outputs : (group + 1) * outputs, position] = True
    return updated


def assert_only_the_scheme_was_trained(before, after, channels):
    assert list(after) == list(before)
    for name, updated in updated_entries(before, channels).items():
        changed = after[name] != before[name]
        assert not changed[~updated].any(), name
        assert not updated.any() or changed[updated].float().mean() > 0.9, name
        assert after[name].isfinite().all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_entries_are_bit_equal_after_20_steps(method, optimizer):
    module = new_module(optimizer=optimizer)
    before = copy_of_state(module.net)
    callback = SparseUpdate(SCHEME, method=method)
    trainer(callback, max_epochs=5).fit(module, batches())
    assert len(module.losses) == 20
    assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)
    assert {name: len(indexes) for name, indexes in callback.channels.items()} == {
        "expand.0": 4,
        "depthwise.0": 4,
        "project": 16,
        "head.0": 4,
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2, "gradient_clip_algorithm": "norm"},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_mask_and_sub_tensor_reach_the_same_weights(arguments, optimizer):
    states = []
    for method in METHODS:
        module = new_module(optimizer=optimizer)
        trainer(SparseUpdate(SCHEME, method=method), precision="64-true", **arguments).fit(module, batches())
        states.append(module.net.state_dict())
    for name, expected in states[1].items():
        torch.testing.assert_close(states[0][name], expected, rtol=1e-7, atol=1e-9)


def test_clipping_and_accumulation_change_the_weights_of_that_test():
    """Or it would compare nothing but the plain case."""
    states = []
    for arguments in ({}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 3}):
        module = new_module()
        trainer(SparseUpdate(SCHEME), **arguments).fit(module, batches())
        states.append(module.net.state_dict()["head.0.weight"])
    assert not torch.allclose(states[0], states[1])
    assert not torch.allclose(states[0], states[2])


class Interruption(Callback):
    """Raises in the middle of training."""

    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise self.exception


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exception", [None, RuntimeError("mine"), KeyboardInterrupt()], ids=repr)
def test_a_plain_network_is_left_behind(method, exception):
    module = new_module()
    module.net.stem[0].bias.requires_grad_(False)
    modules = {name: id(m) for name, m in module.named_modules()}
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    before = copy_of_state(module.net)
    callback = SparseUpdate(SCHEME, method=method)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        if exception is None:
            trainer(callback).fit(module, batches())
        else:
            expected = SystemExit if isinstance(exception, KeyboardInterrupt) else type(exception)
            with pytest.raises(expected):
                trainer(callback, Interruption(exception)).fit(module, batches())
    finally:
        signal.signal(signal.SIGINT, interrupt)  # Lightning ignores it from then on
    assert {name: id(m) for name, m in module.named_modules()} == modules
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)
    assert callback.applied is None


class Look(Callback):
    """Calls a function of the module after every training batch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.function(pl_module)


def test_layers_and_state_dict_in_training():
    module = new_module()
    names = list(module.state_dict())
    seen = []

    def look(pl_module):
        assert isinstance(pl_module.net.expand[0], SubTensorConv2d)
        assert isinstance(pl_module.net.stem[1], MaskedReLU)
        assert type(pl_module.net.stem[0]) is type(pl_module.net.project) is nn.Conv2d
        assert not {"net.expand.0.weight", "net.stem.0.weight"} & {name for name, _ in pl_module.named_buffers()}
        state = copy_of_state(pl_module)
        assert list(state) == names
        plain = Module()
        plain.load_state_dict(state, strict=True)
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(plain.net(x), pl_module.net(x))
        gradients = {name: p.grad.shape for name, p in pl_module.net.named_parameters() if p.grad is not None}
        assert gradients["expand.0.weight_slice"] == (4, 16, 1, 1)
        assert gradients["depthwise.0.weight_slice"] == (4, 1, 3, 3)
        assert not {"expand.0.weight", "depthwise.0.weight", "head.0.weight", "stem.0.weight"} & set(gradients)
        seen.append(state)

    trainer(SparseUpdate(SCHEME), Look(look), max_epochs=1).fit(module, batches())
    assert len(seen) == 4
    assert not torch.equal(seen[0]["net.head.0.weight"], seen[1]["net.head.0.weight"])
    assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in module.state_dict().items())


def fit_with_checkpoints(folder, module, callback, max_epochs=2, **arguments):
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer(callback, keep, max_epochs=max_epochs, enable_checkpointing=True).fit(module, batches(), **arguments)
    return [folder / f"epoch={epoch}.ckpt" for epoch in range(max_epochs)]


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_plain_weights_and_load_into_a_plain_module(tmp_path, method):
    module = new_module(optimizer="adamw")
    callback = SparseUpdate(SCHEME, method=method)
    *_, last = fit_with_checkpoints(tmp_path, module, callback)
    checkpoint = torch.load(last, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Module().state_dict())
    plain = Module()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    loaded = Module.load_from_checkpoint(last, net=None, weights_only=True)
    for name, trained in module.state_dict().items():
        assert torch.equal(plain.state_dict()[name], trained)
        assert torch.equal(loaded.state_dict()[name], trained)
    moments = [tuple(state["exp_avg"].shape) for state in checkpoint["optimizer_states"][0]["state"].values()]
    slices = [(4, 16, 1, 1), (4, 1, 3, 3), (4, 6, 3, 3)]
    full = [(16, 8, 1, 1), (16, 1, 3, 3), (12, 4, 3, 3)]
    assert all((shape in moments) is (method == "sub_tensor") for shape in slices)
    assert all((shape in moments) is (method == "mask") for shape in full)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channel_choice", ["weight_norm", "random"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, method, optimizer, channel_choice):
    whole, callback = new_module(optimizer=optimizer), SparseUpdate(SCHEME, "net", method, channel_choice, seed=3)
    _, checkpoint, *_ = fit_with_checkpoints(tmp_path / "whole", whole, callback, max_epochs=4)
    # other weights and another seed would choose other channels
    resumed, again = new_module(7, optimizer=optimizer), SparseUpdate(SCHEME, "net", method, channel_choice, seed=4)
    fresh = SparseUpdate(SCHEME, "net", method, channel_choice, seed=4)
    trainer(fresh, max_epochs=1).fit(copy.deepcopy(resumed), batches())
    fit_with_checkpoints(tmp_path / "resumed", resumed, again, max_epochs=4, ckpt_path=checkpoint)
    assert len(resumed.losses) == 8
    assert again.channels == callback.channels
    assert fresh.channels != callback.channels
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_resuming_under_another_scheme_or_method_is_refused(tmp_path):
    _, checkpoint = fit_with_checkpoints(tmp_path, new_module(), SparseUpdate(SCHEME))
    other = UpdateScheme("block", 4, {**SCHEME.weights, "expand.0": 0.25})
    module = new_module()
    modules = {name: type(m) for name, m in module.named_modules()}
    with pytest.raises(
        UserError, match=r"the checkpoint was trained under another scheme: bias_depth 4 and weights .*"
    ):
        trainer(SparseUpdate(other)).fit(module, batches(), ckpt_path=checkpoint)
    with pytest.raises(UserError, match="trained with method='sub_tensor', whose optimizer state has other shapes"):
        trainer(SparseUpdate(SCHEME, method="mask")).fit(module, batches(), ckpt_path=checkpoint)
    assert {name: type(m) for name, m in module.named_modules()} == modules


def test_provenance_may_differ_between_runs(tmp_path):
    checkpoint, _ = fit_with_checkpoints(tmp_path, new_module(), SparseUpdate(SCHEME))
    scheme = UpdateScheme("block", 4, SCHEME.weights, provenance={"seed": 3})
    module = new_module()
    trainer(SparseUpdate(scheme)).fit(module, batches(), ckpt_path=checkpoint)
    assert len(module.losses) == 4


def test_a_scheme_file_and_a_network_deeper_inside(tmp_path):
    SCHEME.save(tmp_path / "scheme.json")
    module = new_module(net=nn.Sequential(nn.Identity(), BlockNet()))
    before = copy_of_state(module.net[1])
    callback = SparseUpdate(tmp_path / "scheme.json", network="net.1")
    trainer(callback).fit(module, batches())
    assert_only_the_scheme_was_trained(before, module.net[1].state_dict(), callback.channels)


class Itself(BlockNet, LightningModule):
    """A LightningModule that is the network."""

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def test_the_module_itself_can_be_the_network():
    torch.manual_seed(0)
    module = Itself()
    before = copy_of_state(module)
    callback = SparseUpdate(SCHEME, network="", input_shape=(3, 8, 8))
    trainer(callback).fit(module, batches())
    assert_only_the_scheme_was_trained(before, module.state_dict(), callback.channels)


def test_two_networks_each_with_its_scheme():
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.other = BlockNet()

        def training_step(self, batch, index):
            return super().training_step(batch, index) + F.cross_entropy(self.other(batch[0]), batch[1])

    torch.manual_seed(0)
    module = Two()
    before = [copy_of_state(module.net), copy_of_state(module.other)]
    callbacks = [SparseUpdate(SCHEME), SparseUpdate(SCHEME, network="other", method="mask")]
    trainer(*callbacks).fit(module, batches())
    assert_only_the_scheme_was_trained(before[0], module.net.state_dict(), callbacks[0].channels)
    assert_only_the_scheme_was_trained(before[1], module.other.state_dict(), callbacks[1].channels)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast(method):
    results = {}
    for precision in ("32-true", "bf16-mixed"):
        module, callback = new_module(), SparseUpdate(SCHEME, method=method)
        before, gradients = copy_of_state(module.net), []

        def look(pl_module, gradients=gradients):
            gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

        trainer(callback, Look(look), max_epochs=10, precision=precision).fit(module, batches())
        assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)
        assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])
        results[precision] = gradients[0]
    for name, expected in results["32-true"].items():
        found = results["bf16-mixed"][name]
        assert found.dtype == torch.float32
        # 8 bits of mantissa, and a few activations that fall on the other side of a ReLU's corner
        assert (found - expected).norm() <= 0.1 * expected.norm(), name
    assert not torch.equal(results["bf16-mixed"]["net.classifier.weight"], results["32-true"]["net.classifier.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_weights(method):
    module, callback = new_module(), SparseUpdate(SCHEME, method=method)
    before = {name: tensor.to(torch.bfloat16) for name, tensor in module.net.state_dict().items()}
    trainer(callback, max_epochs=10, precision="bf16-true").fit(module, batches())
    after = module.net.state_dict()
    for name, updated in updated_entries(before, callback.channels).items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name][~updated], before[name][~updated]), name
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])


def graphs_of_network(network):
    """Compiles the network, and returns the list that its graphs go to."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    return torch.compile(network, backend=backend), graphs


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_network(method):
    torch._dynamo.reset()
    eager = new_module()
    before = copy_of_state(eager.net)
    callback = SparseUpdate(SCHEME, method=method)
    trainer(callback).fit(eager, batches())
    module = new_module()
    network = module.net
    module.net, graphs = graphs_of_network(network)
    module.net(torch.zeros(8, 3, 8, 8))  # compiled before the layers are replaced
    graphs.clear()
    trainer(SparseUpdate(SCHEME, method=method)).fit(module, batches())
    assert len(graphs) == 1  # no graph break, no compilation for every step
    code = graphs[0].print_readable(print_output=False)
    assert ("autograd_function_apply" in code) is (method == "sub_tensor")
    assert_only_the_scheme_was_trained(before, network.state_dict(), callback.channels)
    for name, expected in eager.net.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="inductor needs a C++ compiler and Python's headers",
)
def test_a_network_compiled_to_machine_code():
    torch._dynamo.reset()
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        small = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 4)
        )
        modules.append(Module(small))
    eager, compiled = modules
    network = compiled.net
    compiled.net = torch.compile(network)
    scheme = UpdateScheme("small", 1, {"0": 0.34})
    for module in modules:
        # in this process, and without the trial compilations by which inductor finds the widest vectors
        with inductor_config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
            trainer(SparseUpdate(scheme)).fit(module, batches())
    for name, expected in eager.net.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_module():
    torch._dynamo.reset()
    eager, module = new_module(), new_module()
    before = copy_of_state(module.net)
    callback = SparseUpdate(SCHEME)
    trainer(callback).fit(eager, batches())
    trainer(SparseUpdate(SCHEME)).fit(torch.compile(module, backend="eager"), batches())
    assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)
    for name, expected in eager.net.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_weight_averaging_after_it(method):
    plain, module = new_module(), new_module()
    before = copy_of_state(module.net)
    trainer(SparseUpdate(SCHEME, method=method)).fit(plain, batches())
    callback = SparseUpdate(SCHEME, method=method)
    trainer(callback, EMAWeightAveraging(decay=0.5)).fit(module, batches())
    assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)
    assert not torch.allclose(module.net.head[0].weight, plain.net.head[0].weight)


@pytest.mark.parametrize("decay", [0.5, 0.9])  # with 0.9 the average of a whole number with itself may be cut to less
@pytest.mark.parametrize("method", METHODS)
def test_the_exponential_average_is_that_of_the_weights_after_each_step(method, decay):
    module = new_module()
    expected = copy_of_state(module.net)
    states = []
    trainer(SparseUpdate(SCHEME, method=method), Look(lambda m: states.append(copy_of_state(m.net)))).fit(
        module, batches()
    )
    expected = states[0]  # the average starts with the weights after the first step
    for state in states[1:]:
        expected = {name: decay * tensor + (1 - decay) * state[name] for name, tensor in expected.items()}
    averaged = new_module()
    trainer(SparseUpdate(SCHEME, method=method), EMAWeightAveraging(decay=decay)).fit(averaged, batches())
    for name, tensor in averaged.net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_stochastic_weight_averaging_after_it(method):
    module, callback = new_module(), SparseUpdate(SCHEME, method=method)
    before = copy_of_state(module.net)
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    trainer(callback, averaging, max_epochs=4).fit(module, batches())
    assert averaging.n_averaged >= 2
    assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(0.05)])
def test_weight_averaging_before_it_is_refused(averaging):
    with pytest.raises(UserError, match=f"{type(averaging).__name__} stands before SparseUpdate .*: put it after"):
        trainer(averaging, SparseUpdate(SCHEME)).fit(new_module(), batches())


def test_strategies_that_shard_are_refused():
    callback = SparseUpdate(SCHEME)
    with pytest.raises(UserError, match="SparseUpdate does not work with FSDPStrategy, which shards parameters: use"):
        callback.setup(SimpleNamespace(strategy=FSDPStrategy(), callbacks=[callback]), new_module(), "fit")


def test_a_network_built_in_configure_model_is_refused():
    class Late(Module):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            self.net = BlockNet()

    with pytest.raises(
        UserError, match=r"there is no network at 'net' yet: build it in __init__, not in configure_mode"
    ):
        trainer(SparseUpdate(SCHEME)).fit(Late(), batches())


def test_a_wrong_path_is_named_with_what_there_is():
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Identity()

    with pytest.raises(UserError, match="there is no network at 'model' in Two: it has net, teacher"):
        trainer(SparseUpdate(SCHEME, network="model")).fit(Two(), batches())


def test_batch_norm_is_refused():
    module = new_module()
    module.net.stem.append(nn.BatchNorm2d(8))
    with pytest.raises(UserError, match=r"stem\.2 is a BatchNorm2d: .* fold it first with .*fold_batch_norm\(network"):
        trainer(SparseUpdate(SCHEME)).fit(module, batches())
    assert type(module.net.expand[0]) is nn.Conv2d


def test_a_scheme_of_another_network_is_refused():
    with pytest.raises(UserError, match=r"layer features\.3 is no convolution of the network"):
        trainer(SparseUpdate(UpdateScheme("other", 1, {"features.3": 1.0}))).fit(new_module(), batches())


def test_a_network_without_convolutions_is_refused():
    module = new_module(net=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    module.example_input_array = None
    with pytest.raises(UserError, match=r"the network has no nn\.Conv2d: an update scheme is about convolutions"):
        trainer(SparseUpdate(UpdateScheme("net", 0))).fit(module, batches())


@pytest.mark.parametrize("arguments", [{"method": "masked"}, {"channel_choice": "norm"}])
def test_unknown_arguments_are_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(UserError, match=f"{name} is '{value}': give one of "):
        SparseUpdate(SCHEME, **arguments)


class Captured(Module):
    """Collects the parameters for its optimizer too early."""

    def __init__(self):
        super().__init__()
        self.early = list(self.net.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.early, lr=0.1)


class Twice(Module):
    """Gives one parameter to two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.net.classifier.parameters(), lr=0.1)]


class Missing(Module):
    """Leaves the classifier out."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for name, p in self.named_parameters() if "classifier" not in name], lr=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            Captured,
            r"net\.expand\.0\.weight_slice is to be trained, but is in 0 optimizer groups: in configure_optimizers",
        ),
        (Twice, r"net\.classifier\.weight is to be trained, but is in 2 optimizer groups"),
        (Missing, r"net\.classifier\.weight is to be trained, but is in 0 optimizer groups"),
    ],
)
def test_every_trainable_parameter_is_in_exactly_one_optimizer_group(build, message):
    module = build()
    with pytest.raises(UserError, match=message):
        trainer(SparseUpdate(SCHEME)).fit(module, batches())
    assert type(module.net.expand[0]) is nn.Conv2d


def test_layers_without_a_sub_tensor_version_are_masked_and_named(caplog):
    module = new_module()
    head = nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular", groups=2)
    module.net.head[0] = head
    before = copy_of_state(module.net)
    callback = SparseUpdate(SCHEME)
    with caplog.at_level(logging.WARNING):
        trainer(callback, max_epochs=5).fit(module, batches())
    assert [record.getMessage() for record in caplog.records if "microtune" in record.name] == [
        "no sub-tensor version of head.0: the whole input is stored, the whole gradient computed"
    ]
    assert module.net.head[0] is head
    assert_only_the_scheme_was_trained(before, module.net.state_dict(), callback.channels)


def train_as_one_of_two_processes(folder, rank, port):
    """Trains with other weights to start with than the other process, and writes what it started and ended with."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, LOCAL_RANK=str(rank), NODE_RANK="0")  # as torchrun does

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            self.weights = copy_of_state(pl_module.net)
            self.buffer_elements = sum(tensor.numel() for tensor in pl_module.buffers())

    for method, choice in TWO_PROCESSES:
        callback, start = SparseUpdate(SCHEME, method=method, **CHOICES[choice]), Start()
        run = trainer(callback, start, strategy="ddp", devices=2, use_distributed_sampler=False)
        module = new_module(seed=rank)
        result = {"own": copy_of_state(module.net)}
        data = batches().dataset
        run.fit(module, DataLoader(data, 4, sampler=DistributedSampler(data, 2, rank, shuffle=False)))
        result |= {"start": start.weights, "end": module.net.state_dict(), "channels": callback.channels}
        result |= {"moved_channels": callback.moved_channels}
        result |= {"buffer_elements": start.buffer_elements}
        torch.save(result, folder / f"{method}-{choice}-{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, fork):
    """What each of two processes wrote, by method and choice of channels."""
    folder, port = tmp_path_factory.mktemp("ddp"), find_free_network_port()
    processes = [fork.Process(target=train_as_one_of_two_processes, args=(folder, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()  # where the other one failed, and this one waits for it
    assert [process.exitcode for process in processes] == [0, 0]
    return {
        (method, choice): [torch.load(folder / f"{method}-{choice}-{rank}.pt", weights_only=True) for rank in range(2)]
        for method, choice in TWO_PROCESSES
    }


@pytest.mark.parametrize(("method", "choice"), TWO_PROCESSES)
def test_two_processes_end_like_one(two_processes, method, choice):
    first, second = two_processes[method, choice]
    module, callback = new_module(seed=0), SparseUpdate(SCHEME, method=method, **CHOICES[choice])
    trainer(callback).fit(module, batches(batch_size=8))
    assert first["channels"] == second["channels"] == callback.channels
    assert first["moved_channels"] == second["moved_channels"] == callback.moved_channels
    assert (callback.moved_channels > 0) is (choice == "anew")
    for name, expected in module.net.state_dict().items():
        torch.testing.assert_close(first["end"][name], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["end"][name], second["end"][name]), name
    if choice == "once":
        assert_only_the_scheme_was_trained(first["own"], second["end"], callback.channels)


@pytest.mark.parametrize("method", METHODS)
def test_processes_take_the_first_ones_weights_and_channels(two_processes, method):
    first, second = two_processes[method, "once"]
    own = new_module(seed=1)
    fresh = SparseUpdate(SCHEME, method=method)
    trainer(fresh, max_epochs=1).fit(own, batches())
    assert fresh.channels != second["channels"]  # what the second process would have chosen
    for name, tensor in first["own"].items():
        assert not torch.equal(second["own"][name], tensor)
        assert torch.equal(second["start"][name], tensor)
        assert torch.equal(first["start"][name], tensor)


def test_frozen_weights_do_not_travel_between_processes(two_processes):
    """Buffers are sent before every step: there are none."""
    for first, _ in two_processes.values():
        assert first["buffer_elements"] == 0
