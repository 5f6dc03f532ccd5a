"""Promises of Int8Weights: integers that a device can hold, after every step, and a run that can be resumed."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from microtune.callbacks.int8_weights import Int8Weights
from microtune.callbacks.quantization_aware_scaling import QuantizationAwareScaling
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors, quantized_tensors
from microtune.modules.int8.stochastic_rounding import IntegerGenerator, round_stochastically
from microtune.modules.sparse_update.subtensor import by_input_channel
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

METHODS, STORAGES = ["sub_tensor", "mask"], ["latent", "in_place"]
LARGEST_BIAS = 2**31 - 2**24
BIASES = [f"blocks.{block}" for block in ("1.depthwise", "1.pointwise2", "2.pointwise1", "2.depthwise", "2.pointwise2")]
SCHEME = UpdateScheme(
    "small-int8", 5, {"blocks.1.pointwise2": 0.5, "blocks.2.pointwise1": 1.0, "blocks.2.depthwise": 0.25}
)


class Module(LightningModule):
    """A user's module around an int8 network; it keeps the network's state before training and after every batch."""

    def __init__(self, graph, tensors, learning_rate=0.02, classifier_rate=None, **options):
        super().__init__()
        self.net = QuantizedNetwork(graph)
        load_quantized_tensors(self.net, tensors)
        self.example_input_array = torch.zeros(1, *graph.input_shape)
        self.learning_rate, self.classifier_rate = learning_rate, classifier_rate or learning_rate
        self.options = {"momentum": 0.9, "weight_decay": 0.01, **options}
        self.states, self.losses = [], []

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_start(self):
        self.states.append(copy_of_state(self))

    def on_train_batch_end(self, *_):
        self.states.append(copy_of_state(self))

    def configure_optimizers(self):
        last = list(self.net.classifier.parameters())
        rest = [p for name, p in self.net.named_parameters() if not name.startswith("classifier.")]
        groups = [{"params": last, "lr": self.classifier_rate}, {"params": rest, "lr": self.learning_rate}]
        return torch.optim.SGD(groups, **self.options)


def copy_of_state(module):
    return {name: tensor.clone() for name, tensor in module.net.state_dict().items()}


def assert_same_state(states, expected):
    assert list(states) == list(expected)
    assert all(torch.equal(states[name], tensor) for name, tensor in expected.items())


def callbacks(storage, method="sub_tensor", seed=0):
    """What trains an int8 network; every layer whole where there is no method."""
    sparse = [SparseUpdate(SCHEME, method=method)] if method else []
    return [*sparse, QuantizationAwareScaling(), Int8Weights(storage, seed)]


def fit(module, *callbacks, max_epochs=1, ckpt_path=None, **arguments):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 32, 32, generator=generator) / 2, torch.arange(16) % 10)
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **arguments},
    )
    trainer.fit(module, DataLoader(data, 4), ckpt_path=ckpt_path)
    return module


@pytest.fixture
def new_module(small_graph, small_tensors):
    """Makes a module around the same int8 network."""
    return lambda **arguments: Module(small_graph, small_tensors, **arguments)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        for message in (
            "does not have many workers",
            "isinstance.treespec",
            "dirpath has changed",
            "callbacks used to create",
        ):
            warnings.filterwarnings("ignore", f".*{message}")
        yield


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
def test_after_every_step_integers_are_in_their_range_however_large_it_was(new_module, method, storage):
    module = new_module(learning_rate=1e7, classifier_rate=0.01, momentum=0.5, weight_decay=0)
    fit(module, *callbacks(storage, method))
    assert len(module.states) == 5
    for state in module.states:
        assert_in_range(state)
    last = module.states[-1]
    assert last["blocks.2.pointwise1.weight"].min() == -128
    assert last["blocks.2.pointwise1.weight"].max() == 127
    assert last["blocks.2.pointwise2.bias"].abs().max() == LARGEST_BIAS
    assert all(tensor.isfinite().all() for tensor in last.values())


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_trained_starts_in_its_range_too(new_module, storage):
    """Networks that the paper's code trained have larger weights."""
    module = new_module()
    with torch.no_grad():
        module.net.blocks[2].pointwise1.weight[0, 0] = 225
        module.net.blocks[2].pointwise1.weight[1, 0] = -225
        module.net.blocks[2].pointwise1.bias[0] = 2**31
    before = copy_of_state(module)
    fit(module, *callbacks(storage))
    start = module.states[0]
    assert start["blocks.2.pointwise1.weight"][:2, 0].flatten().tolist() == [127, -128]
    assert start["blocks.2.pointwise1.bias"][0] == LARGEST_BIAS
    assert_in_range(start)
    changed = {name: (tensor != before[name]).sum().item() for name, tensor in start.items()}
    assert {name: count for name, count in changed.items() if count} == {
        "blocks.2.pointwise1.weight": 2,
        "blocks.2.pointwise1.bias": 1,
    }


def trained_entries(state, channels):
    """Which entries of which tensor the scheme updates, worked out from its words."""
    updated = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in state.items()}
    for name in ["classifier.weight", "classifier.bias"] + [f"{layer}.bias" for layer in BIASES]:
        updated[name][:] = True
    for name, indexes in channels.items():
        if name.endswith("depthwise"):
            updated[f"{name}.weight"][indexes] = True
        else:
            updated[f"{name}.weight"][:, indexes] = True
    return updated


@pytest.mark.parametrize("method", METHODS)
def test_in_place_integers_are_whole_at_every_moment_and_frozen_ones_stay(new_module, method):
    module = new_module()
    used = callbacks("in_place", method)
    fit(module, *used, max_epochs=2)
    assert len(module.states) == 9
    first, last = module.states[0], module.states[-1]
    assert all(is_whole(state) for state in module.states)
    for name, updated in trained_entries(first, used[0].channels).items():
        assert all(torch.equal(state[name][~updated], first[name][~updated]) for state in module.states), name
        if updated.any():
            assert (last[name] != first[name])[updated].float().mean() > 0.1, name


def test_latent_copies_are_not_rounded_and_the_network_computes_with_rounded_ones(new_module, small_graph):
    module = fit(new_module(), *callbacks("latent"))
    assert not is_whole(module.states[1])
    state = module.net.state_dict()
    rounded = QuantizedNetwork(small_graph)
    rounded.load_state_dict({**state, **{name: tensor.round() for name, tensor in integers(state).items()}})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(module.net(x), rounded(x))
    _, tensors = quantized_tensors(module.net)
    assert all(torch.equal(tensors[name].float(), t) for name, t in integers(rounded.state_dict()).items())


def test_in_place_steps_below_a_half_are_not_lost(new_module):
    latent, in_place = (
        fit(new_module(learning_rate=5e-3, momentum=0), *callbacks(storage)) for storage in STORAGES
    )  # the same first step
    name = "blocks.2.pointwise1.weight"
    step = latent.states[1][name] - latent.states[0][name]
    taken = in_place.states[1][name] - in_place.states[0][name]
    assert 0.2 < step.abs().max() < 0.5
    assert taken.abs().max() == 1
    assert ((taken == 0) | (taken == step.sign())).all()
    deviation = (step.abs() * (1 - step.abs())).sum().sqrt()  # of the sum of steps, by the variance of each
    assert (taken.sum() - step.sum()).abs() < 4 * deviation


@pytest.mark.parametrize("method", METHODS)
def test_in_place_integers_are_rounded_in_forward_order_as_documented(new_module, method):
    """A device draws in this order too, and has the same integers after the same step."""
    whole = dict.fromkeys(SCHEME.weights, 1.0) if method == "mask" else SCHEME.weights
    scheme = UpdateScheme("small-int8", 5, whole)
    latent, in_place = new_module(), new_module()
    sparse = SparseUpdate(scheme, method=method)
    fit(latent, sparse, QuantizationAwareScaling())  # without limits: these come after rounding
    fit(in_place, SparseUpdate(scheme, method=method), QuantizationAwareScaling(), Int8Weights("in_place", seed=11))
    generator = IntegerGenerator(11)
    stepped, rounded = latent.states[1], in_place.states[1]
    for layer in BIASES:
        if layer in sparse.channels:
            stepped_weight, rounded_weight = stepped[f"{layer}.weight"], rounded[f"{layer}.weight"]
            if method == "sub_tensor":
                groups = 24 if layer.endswith("depthwise") else 1
                stepped_weight, rounded_weight = (
                    by_input_channel(weight, groups).flatten(0, 1)[sparse.channels[layer]]
                    for weight in (stepped_weight, rounded_weight)
                )
            expected = round_stochastically(stepped_weight, generator).clamp(-128, 127)
            assert torch.equal(rounded_weight, expected), layer
        expected = round_stochastically(stepped[f"{layer}.bias"], generator)
        assert torch.equal(rounded[f"{layer}.bias"], expected), layer


def test_integers_are_drawn_for_once_per_step_of_the_optimizer(new_module):
    used = callbacks("in_place", seed=5)
    fit(new_module(), *used, accumulate_grad_batches=2, max_epochs=3)
    trained = 12 * 8 + 24 * 8 + 6 * 9 + (24 + 8 + 24 + 24 + 16)
    assert used[-1].generator.state == (5 + 0x9E3779B9 * trained * 6) % 2**32
    assert used[-1].parameters == []  # let go of


def test_latent_copies_draw_nothing(new_module):
    used = callbacks("latent", seed=5)
    fit(new_module(), *used)
    assert used[-1].generator.state == 5


def test_the_seed_decides(new_module):
    first, same, other = (fit(new_module(), *callbacks("in_place", seed=seed)).states[-1] for seed in (1, 1, 2))
    assert_same_state(first, same)
    assert not torch.equal(first["blocks.2.pointwise1.weight"], other["blocks.2.pointwise1.weight"])
    latent = [fit(new_module(), *callbacks("latent", seed=seed)).states[-1] for seed in (1, 2)]
    assert_same_state(*latent)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_callbacks_is_free(new_module, method, storage):
    expected = fit(new_module(), *callbacks(storage, method))
    assert_same_state(fit(new_module(), *reversed(callbacks(storage, method))).states[-1], expected.states[-1])


def test_mask_and_sub_tensor_reach_the_same_weights(new_module):
    modules = [fit(new_module(), *callbacks("latent", method), max_steps=2) for method in METHODS]
    assert len(modules[0].states) == 3
    for name, expected in modules[1].net.state_dict().items():
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(modules[0].net.state_dict()[name], expected, rtol=1e-4, atol=atol)
    name = "blocks.2.depthwise.weight"
    assert (modules[0].states[-1][name] - modules[0].states[0][name]).abs().max() > 1


def fit_with_checkpoints(folder, module, *used, max_epochs=2, **arguments):
    fit(module, *used, ModelCheckpoint(folder, "{epoch}", save_top_k=-1), max_epochs=max_epochs, **arguments)
    return [folder / f"epoch={epoch}.ckpt" for epoch in range(max_epochs)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, new_module, method, storage):
    whole = new_module()
    first, _ = fit_with_checkpoints(tmp_path / "whole", whole, *callbacks(storage, method, seed=3))
    resumed, used = new_module(), callbacks(storage, method, seed=4)
    fit_with_checkpoints(tmp_path / "resumed", resumed, *used, ckpt_path=first)
    assert len(whole.states) == 9
    assert len(resumed.states) == 5
    for state, expected in zip(resumed.states, whole.states[4:], strict=True):
        assert_same_state(state, expected)
    assert whole.losses[4:] == resumed.losses
    assert not torch.equal(whole.states[4]["blocks.2.depthwise.weight"], whole.states[8]["blocks.2.depthwise.weight"])


@pytest.mark.parametrize("storage", STORAGES)
def test_checkpoints_hold_the_generator_and_load_with_weights_only(tmp_path, new_module, storage):
    module, used = new_module(), callbacks(storage, seed=3)
    *_, last = fit_with_checkpoints(tmp_path, module, *used)
    checkpoint = torch.load(last, weights_only=True)
    state = used[-1].generator.state
    assert checkpoint["callbacks"][used[-1].state_key] == {"storage": storage, "generator": state}
    assert (state == 3) == (storage == "latent")
    assert is_whole({name.removeprefix("net."): t for name, t in checkpoint["state_dict"].items()}) == (
        storage == "in_place"
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_plain_network_takes_the_weights_of_a_checkpoint(tmp_path, new_module, small_graph, method, storage):
    module = new_module()
    *_, last = fit_with_checkpoints(tmp_path, module, *callbacks(storage, method))
    state = torch.load(last, weights_only=True)["state_dict"]
    plain = QuantizedNetwork(small_graph)
    plain.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    assert_same_state(plain.state_dict(), module.net.state_dict())


@pytest.mark.parametrize(("storage", "other"), [("latent", "in_place"), ("in_place", "latent")])
def test_resuming_with_the_other_storage_is_refused(tmp_path, new_module, storage, other):
    first, _ = fit_with_checkpoints(tmp_path, new_module(), *callbacks(storage))
    message = f"the checkpoint was trained with {storage} weights: resume with these, or start anew"
    with pytest.raises(UserError, match=f"^{message}$"):
        fit(new_module(), *callbacks(other), max_epochs=2, ckpt_path=first)


def test_an_unknown_storage_is_refused():
    with pytest.raises(UserError, match=r"^storage is 'inplace': give one of latent, in_place$"):
        Int8Weights("inplace")


def test_a_wrong_path_is_named(new_module):
    with pytest.raises(UserError, match="there is no network at 'model' in Module: it has net"):
        fit(new_module(), Int8Weights(network="model"))


def test_states_of_several_networks_are_kept_apart():
    assert Int8Weights().state_key != Int8Weights(network="other").state_key
    assert Int8Weights("latent").state_key == Int8Weights("in_place").state_key  # so that the other is refused


def test_evaluation_changes_nothing(new_module):
    class Evaluated(Callback):
        """Evaluates between two batches."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            before = copy_of_state(pl_module)
            with torch.no_grad():
                pl_module.net(torch.zeros(1, 3, 32, 32))
            assert_same_state(copy_of_state(pl_module), before)

    fit(new_module(), *callbacks("in_place"), Evaluated())
