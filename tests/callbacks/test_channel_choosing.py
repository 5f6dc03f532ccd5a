"""Promises of channels that are chosen by data, or anew in training: what moves, what stays, and that it repeats."""

import copy
import logging
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from microtune.callbacks.int8_training import Int8Training
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.datamodules.reproducible_order import data_loader
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.channel_choice import highest_channels, is_due
from microtune.modules.sparse_update.channel_importance import (
    WITHOUT_DATA,
    Criterion,
    measure_importance,
    summed_cross_entropy,
)
from microtune.modules.sparse_update.fitted_classifier import measure_with_fitted_classifier
from microtune.modules.sparse_update.int8_update import quantized_parameters
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

METHODS = ["sub_tensor", "mask"]
CRITERIA = list(Criterion.__args__)
SCHEME = UpdateScheme("block", 4, {"expand.0": 0.5, "depthwise.0": 0.25, "project": 1.0, "head.0": 0.5})
INT8_SCHEME = UpdateScheme("small-int8", 5, {"blocks.1.pointwise2": 0.5, "blocks.2.depthwise": 0.25})
CHOSEN = ["expand.0", "depthwise.0", "head.0"]


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
    """A user's module, which keeps what it was given and what it made of its network."""

    def __init__(self, net, optimizer="sgd", learning_rate=0.1):
        super().__init__()
        self.net, self.optimizer, self.learning_rate = net, optimizer, learning_rate
        size = (3, 8, 8) if isinstance(net, BlockNet) else (3, 32, 32)
        self.example_input_array = torch.zeros(1, *size)
        self.batches, self.states, self.channels = [], [], []

    def training_step(self, batch, _):
        self.batches.append(batch[0].clone())
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_):
        self.states.append(copy_of_state(self.net))
        sparse = [callback for callback in self.trainer.callbacks if isinstance(callback, SparseUpdate)]
        self.channels.append(dict(sparse[0].channels) if sparse else {})

    def configure_optimizers(self):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=0.01)


class Samples:
    """Samples that are another in every epoch, as those that are augmented."""

    def __init__(self, size=8, count=32):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(count) % 4
        classes = torch.randn(4, 3, size, size, generator=generator)
        self.x = torch.randn(count, 3, size, size, generator=generator) / 2 + classes[self.y]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.x[index] * (1 + 0.1 * epoch), self.y[index]


def shuffled(size=8, batch_size=8, workers=0):
    return data_loader(Samples(size), batch_size, shuffle_seed=5, num_workers=workers, collate=default_collate)


def new_module(seed=0, **arguments):
    torch.manual_seed(seed)
    return Module(BlockNet(), **arguments)


def copy_of_state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def trainer_of(*callbacks, max_epochs=2, **arguments):
    arguments = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **arguments}
    return Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **arguments},
    )


def fit(module, *callbacks, loader=None, ckpt_path=None, **arguments):
    trainer = trainer_of(*callbacks, **arguments)
    trainer.fit(module, shuffled() if loader is None else loader, ckpt_path=ckpt_path)
    return module


def entries_of(state, channels, groups_of):
    """Which entries of the weights belong to the channels, worked out without the code under test."""
    entries = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in state.items()}
    for name, indexes in channels.items():
        weight = entries[f"{name}.weight"]
        outputs = len(weight) // groups_of.get(name, 1)
        for channel in indexes:
            group, position = divmod(channel, weight.shape[1])
            weight[group * outputs : (group + 1) * outputs, position] = True
    return entries


def assert_steps_moved_the_slices_alone(first, module, scheme, groups_of, biases):
    """Of every step: all weights of convolutions outside the slice are bit-equal to those before it."""
    states = [first, *module.states]
    for step, channels in enumerate(module.channels):
        for name, updated in entries_of(first, channels, groups_of).items():
            if name.startswith("classifier.") or name.removesuffix(".bias") in biases:
                continue
            changed = states[step + 1][name] != states[step][name]
            assert not changed[~updated].any(), (step, name)
            assert not updated.any() or changed[updated].any(), (step, name)
    assert {name: len(indexes) for name, indexes in channels.items()}.keys() == scheme.weights.keys()


GROUPS = {"depthwise.0": 16, "head.0": 2}
BIASES = ["expand.0", "depthwise.0", "project", "head.0"]


# ---- when


@pytest.mark.parametrize(
    ("step", "chosen_at_step", "rechoose_every", "expected"),
    [
        (0, None, 0, True),
        (7, None, 0, True),
        (0, 0, 0, False),
        (100, 0, 0, False),
        (0, 0, 3, False),
        (2, 0, 3, False),
        (3, 0, 3, True),
        (3, 3, 3, False),  # further batches of the step
        (5, 3, 3, False),
        (6, 3, 3, True),
        (4, 0, 3, True),  # two optimizers step over 3
        (6, 4, 3, True),
        (1, 0, 1, True),
    ],
)
def test_when_a_choice_is_due(step, chosen_at_step, rechoose_every, expected):
    assert is_due(step, chosen_at_step, rechoose_every) is expected


class Recorded:
    """A loss that notes when, and of which samples, it was asked for."""

    def __init__(self):
        self.module, self.steps, self.batch_indexes, self.samples = None, [], [], []

    def __call__(self, network, batch):
        self.steps.append(self.module.trainer.global_step)
        self.batch_indexes.append(self.module.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1)
        self.samples.append(batch[0].clone())
        return summed_cross_entropy(network, batch)


def fit_recorded(module=None, choice_samples=8, rechoose_every=0, loader=None, **arguments):
    """The loss of a run, and its module."""
    loss = Recorded()
    loss.module = module = module or new_module()
    callback = SparseUpdate(
        SCHEME,
        channel_choice="taylor",
        rechoose_every=rechoose_every,
        choice_samples=choice_samples,
        summed_loss=loss,
    )
    fit(module, callback, loader=loader, **arguments)
    return loss, module


def test_once_before_the_first_step():
    loss, _ = fit_recorded()
    assert loss.steps == [0]


def test_anew_before_every_third_step():
    loss, _ = fit_recorded(rechoose_every=3, max_epochs=3)  # 12 steps
    assert loss.steps == [0, 3, 6, 9]


def test_never_while_gradients_accumulate():
    loss, _ = fit_recorded(rechoose_every=1, accumulate_grad_batches=3, max_epochs=2)  # of 4 batches, 2 steps
    assert loss.steps == [0, 1, 2, 3]
    assert loss.batch_indexes == [0, 3, 0, 3]


def test_two_optimizers():
    class Two(Module):
        automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            last = list(self.net.classifier.parameters())
            rest = [p for name, p in self.net.named_parameters() if not name.startswith("classifier.")]
            return [torch.optim.SGD(last, lr=0.1), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]

    torch.manual_seed(0)
    module = Two(BlockNet())
    before = copy_of_state(module.net)
    loss, _ = fit_recorded(module, rechoose_every=3)  # of 16 steps, two at a time
    assert loss.steps == [0, 4, 6, 10, 12]
    assert_steps_moved_the_slices_alone(before, module, SCHEME, GROUPS, BIASES)


# ---- by which samples


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (8, 1), (9, 2), (16, 2), (1000, 4)])
def test_the_first_batches_of_the_epoch_are_what_training_gets(samples, batches):
    loss, module = fit_recorded(choice_samples=samples, rechoose_every=5, max_epochs=2)
    assert loss.steps == [0] * batches + [5] * batches
    for chosen, trained in zip(loss.samples, module.batches[:batches] + module.batches[4 : 4 + batches], strict=True):
        assert torch.equal(chosen, trained)
    assert not torch.equal(module.batches[0], module.batches[4])  # another order in another epoch


def test_no_more_than_the_trainer_trains_on():
    loss, _ = fit_recorded(choice_samples=100, limit_train_batches=2)
    assert loss.steps == [0, 0]


def test_batches_go_through_the_hooks_of_training():
    class Hooked(Module):
        def on_before_batch_transfer(self, batch, _):
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch, _):
            return batch[0] * 2, batch[1]

    torch.manual_seed(0)
    loss, module = fit_recorded(Hooked(BlockNet()), precision="64-true")
    assert torch.equal(loss.samples[0], module.batches[0])
    assert loss.samples[0].dtype == torch.float64
    assert not torch.equal(loss.samples[0], fit_recorded(precision="64-true")[0].samples[0])


class Drawing(Samples):
    """Samples to which noise from the global random state is added."""

    def __getitem__(self, key):
        x, y = super().__getitem__(key)
        return x + torch.randn(()), y


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Samples(), 8, shuffle=True),
        lambda: DataLoader(Samples(), 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda: DataLoader(Drawing(), 8),
    ],
    ids=["global", "own generator", "noise"],
)
def test_training_gets_the_samples_that_it_would_have_got(loader):
    modules = []
    for choice in ("weight_norm", "taylor"):
        modules.append(new_module())
        fit(modules[-1], SparseUpdate(SCHEME, channel_choice=choice, rechoose_every=3), loader=loader())
    without, with_choice = (module.batches for module in modules)
    assert all(torch.equal(one, other) for one, other in zip(without, with_choice, strict=True))
    assert modules[0].channels != modules[1].channels


def test_a_choice_does_not_depend_on_the_global_random_state():
    """Which a resumed run has another of."""
    found = []
    for seed in (1, 2):
        module = new_module()
        torch.manual_seed(seed)
        loss, _ = fit_recorded(module, loader=DataLoader(Drawing(), 8, shuffle=True))
        found.append(loss.samples[0])
        assert not torch.equal(loss.samples[0], module.batches[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("choice", CRITERIA)
def test_the_highest_scores_are_chosen(choice):
    """Those of the second half of the samples, through a classifier that knows the first."""
    module = new_module()
    network = copy.deepcopy(module.net)
    operations = find_operations(network, (3, 8, 8))
    convolutions = [c for c in operations.convolutions if c.name in CHOSEN]
    callback = SparseUpdate(SCHEME, channel_choice=choice, seed=4, choice_samples=16)
    fit(module, callback)
    batches = [(x, y_of(x)) for x in module.batches[:2]]
    importance, _ = measure_with_fitted_classifier(network, operations, convolutions, batches)
    expected = {
        name: highest_channels(scores, len(callback.channels[name]))
        for name, scores in importance.scores(choice, seed=4).items()
    }
    assert {name: callback.channels[name] for name in CHOSEN} == expected
    assert callback.channels["project"] == list(range(16))
    assert callback.moved_channels == 0


def y_of(x):
    data = Samples()
    return torch.stack([data.y[(data.x == one).flatten(1).all(1)][0] for one in x])


@pytest.mark.parametrize("choice", ["weight_norm", "gradient_norm", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_a_later_choice_is_made_from_the_weights_of_then(method, choice):
    module = new_module()
    callback = SparseUpdate(SCHEME, method=method, channel_choice=choice, seed=2, rechoose_every=6, choice_samples=8)
    fit(module, callback, max_epochs=2)
    network = BlockNet()
    network.load_state_dict(module.states[5])
    convolutions = [c for c in find_operations(network, (3, 8, 8)).convolutions if c.name in CHOSEN]
    batch = module.batches[4]  # the first of the second epoch
    labels = labels_of_epoch(batch, 1)
    importance = measure_importance(network, convolutions, [(batch, labels)])
    expected = {
        name: highest_channels(scores, len(callback.channels[name]))
        for name, scores in importance.scores(choice, seed=2 * 1_000_003 + 6).items()
    }
    assert {name: callback.channels[name] for name in CHOSEN} == expected
    assert module.channels[5] != module.channels[6]


def labels_of_epoch(batch, epoch):
    data = Samples()
    x = data.x * (1 + 0.1 * epoch)
    return torch.stack([data.y[(x == one).flatten(1).all(1)][0] for one in batch])


def test_a_compiled_network_is_measured():
    torch._dynamo.reset()
    eager, compiled = new_module(), new_module()
    compiled.net.compile(backend="eager")
    callbacks = [SparseUpdate(SCHEME, channel_choice="fisher") for _ in range(2)]
    for module, callback in zip((eager, compiled), callbacks, strict=True):
        fit(module, callback)
    assert callbacks[0].channels == callbacks[1].channels
    assert callbacks[0].channels != fit(new_module(), SparseUpdate(SCHEME)).channels[0]


# ---- what moves, and what stays


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("choice", "rechoose_every"), [("taylor", 0), ("random", 2), ("loss_decrease", 3)])
def test_all_outside_the_current_slice_is_bit_equal(method, optimizer, choice, rechoose_every):
    module = new_module(optimizer=optimizer)
    before = copy_of_state(module.net)
    callback = SparseUpdate(SCHEME, method=method, channel_choice=choice, rechoose_every=rechoose_every)
    fit(module, callback, max_epochs=3)
    assert_steps_moved_the_slices_alone(before, module, SCHEME, GROUPS, BIASES)
    distinct = {str(channels) for channels in module.channels}
    assert (len(distinct) > 1) is (rechoose_every > 0)
    assert (callback.moved_channels > 0) is (rechoose_every > 0)
    after = module.net.state_dict()
    assert all(torch.equal(tensor, module.states[-1][name]) for name, tensor in after.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("choice", ["random", "gradient_norm"])
def test_mask_and_sub_tensor_reach_the_same_weights(choice, optimizer):
    modules = []
    for method in METHODS:
        modules.append(new_module(optimizer=optimizer))
        callback = SparseUpdate(SCHEME, method=method, channel_choice=choice, rechoose_every=3)
        fit(modules[-1], callback, precision="64-true")
    assert modules[0].channels == modules[1].channels
    assert modules[0].channels[0] != modules[0].channels[-1]
    for name, expected in modules[1].net.state_dict().items():
        torch.testing.assert_close(modules[0].net.state_dict()[name], expected, rtol=1e-7, atol=1e-9)


@pytest.fixture
def int8_module(small_graph, small_tensors):
    """Makes a module around the same int8 network."""

    def make():
        network = QuantizedNetwork(small_graph)
        load_quantized_tensors(network, small_tensors)
        return Module(network, learning_rate=0.02)

    return make


def int8_callbacks(method="sub_tensor", storage="in_place", choice="random"):
    sparse = SparseUpdate(INT8_SCHEME, "net", method, choice, rechoose_every=3, choice_samples=8)
    return [sparse, Int8Training(storage)]


@pytest.mark.parametrize("storage", ["in_place", "latent"])
@pytest.mark.parametrize("method", METHODS)
def test_int8_weights_outside_the_current_slice_are_bit_equal(int8_module, method, storage):
    module = int8_module()
    before = copy_of_state(module.net)
    fit(module, *int8_callbacks(method, storage), loader=shuffled(32))
    groups = {"blocks.2.depthwise": 24}
    biases = ["blocks.1.depthwise", "blocks.1.pointwise2"] + [
        f"blocks.2.{layer}" for layer in ("pointwise1", "depthwise", "pointwise2")
    ]
    states = [before, *module.states]
    for step, channels in enumerate(module.channels):
        for name, updated in entries_of(before, channels, groups).items():
            if not name.startswith("classifier.") and name.removesuffix(".bias") not in biases:
                # what left is rounded where there are copies in floating point, and never else
                was = states[step][name].round() if name.endswith(".weight") else states[step][name]
                assert torch.equal(states[step + 1][name][~updated], was[~updated]), (step, name)
    assert module.channels[0] != module.channels[-1]
    trained = module.states[-1]["blocks.2.depthwise.weight"]
    assert (trained == trained.round()).all() == (storage == "in_place")


class FollowsScales(Callback):
    """Checks after every step that the int8 callback knows what is trained, with the scales of its channels."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        expected = quantized_parameters(pl_module.net)
        for callback in trainer.callbacks:
            if isinstance(callback, Int8Training):
                for one, other in zip(callback.parameters, expected, strict=True):
                    assert one.parameter is other.parameter
                    assert torch.equal(one.scale, other.scale)
        self.scales = next(one.scale for one in expected if one.scale.shape[0] == 6)


def test_scales_of_int8_layers_move_with_their_channels(int8_module):
    seen = []
    for max_steps in (1, 4):
        follows = FollowsScales()
        fit(int8_module(), *int8_callbacks(), follows, loader=shuffled(32), max_steps=max_steps, max_epochs=1)
        seen.append(follows.scales)
    assert not torch.equal(*seen)


# ---- a run that is resumed


def checkpoints(folder):
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1)


EVERY_CHOICE = [(choice, "sub_tensor", "adamw") for choice in CRITERIA]
EVERY_STATE = [("taylor", method, optimizer) for method in METHODS for optimizer in ("sgd", "adamw")]


@pytest.mark.parametrize(("choice", "method", "optimizer"), sorted({*EVERY_CHOICE, *EVERY_STATE}))
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, choice, method, optimizer):
    arguments = {"method": method, "channel_choice": choice, "rechoose_every": 3, "choice_samples": 16}
    whole, callback = new_module(optimizer=optimizer), SparseUpdate(SCHEME, **arguments)
    fit(whole, callback, checkpoints(tmp_path), max_epochs=4)
    resumed, again = new_module(7, optimizer=optimizer), SparseUpdate(SCHEME, **arguments)
    fit(resumed, again, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.channels == whole.channels[8:]
    assert again.moved_channels == callback.moved_channels > 0
    for one, other in zip(resumed.states, whole.states[8:], strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_choice_by_data_is_not_made_again(tmp_path):
    whole, callback = new_module(), SparseUpdate(SCHEME, channel_choice="taylor")
    fit(whole, callback, checkpoints(tmp_path))
    loss = Recorded()
    loss.module = resumed = new_module(7)
    again = SparseUpdate(SCHEME, channel_choice="taylor", summed_loss=loss)
    fit(resumed, again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert loss.steps == []
    assert again.channels == callback.channels
    assert all(torch.equal(tensor, whole.states[-1][name]) for name, tensor in resumed.net.state_dict().items())


class Killed(Callback):
    """Kills its own process, as no one can prevent, in the middle of the third epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path, fork, int8_module, kind, method):
    def run(folder, *more, **arguments):
        if kind == "int8":
            module, callbacks = int8_module(), int8_callbacks(method, choice="taylor")
        else:
            module = new_module()
            callbacks = [SparseUpdate(SCHEME, "net", method, "taylor", rechoose_every=3, choice_samples=8)]
        loader = shuffled(32 if kind == "int8" else 8)
        return fit(module, *callbacks, checkpoints(folder), *more, loader=loader, max_epochs=4, **arguments)

    child = fork.Process(target=run, args=(tmp_path / "killed", Killed()))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    resumed = run(tmp_path / "killed", ckpt_path=tmp_path / "killed/epoch=1.ckpt")
    whole = run(tmp_path / "whole")
    assert resumed.channels == whole.channels[8:]
    assert whole.channels[8] != whole.channels[-1]
    assert all(torch.equal(tensor, whole.net.state_dict()[name]) for name, tensor in resumed.net.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channel_choice": "fisher"}, r"trained with channel_choice='taylor', and this is 'fisher': resume with that"),
        ({"rechoose_every": 2}, r"trained with rechoose_every=3, and this is 2: resume with that one, or start anew"),
        ({"rechoose_every": 0}, r"trained with rechoose_every=3, and this is 0: resume with that one, or start anew"),
    ],
)
def test_resuming_with_another_choice_is_refused(tmp_path, changed, message):
    arguments = {"channel_choice": "taylor", "rechoose_every": 3}
    fit(new_module(), SparseUpdate(SCHEME, **arguments), checkpoints(tmp_path), max_epochs=1)
    with pytest.raises(UserError, match=message):
        fit(new_module(), SparseUpdate(SCHEME, **arguments | changed), ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.parametrize("choice", WITHOUT_DATA)
def test_checkpoints_from_before_there_was_a_choice_load(tmp_path, choice):
    whole = fit(new_module(), SparseUpdate(SCHEME, channel_choice=choice), checkpoints(tmp_path))
    path = tmp_path / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("SparseUpdate"))
    for name in ("channel_choice", "rechoose_every", "chosen_at_step", "moved_channels"):
        del state[name]
    torch.save(checkpoint, path)
    resumed = fit(new_module(3), SparseUpdate(SCHEME, channel_choice=choice), ckpt_path=path)
    assert all(torch.equal(tensor, whole.states[-1][name]) for name, tensor in resumed.net.state_dict().items())
    with pytest.raises(UserError, match="trained with rechoose_every=0, and this is 5"):
        fit(new_module(), SparseUpdate(SCHEME, channel_choice=choice, rechoose_every=5), ckpt_path=path)


# ---- what is said, and refused


class Logged(DummyLogger):
    """Keeps the metrics of choices."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        if "moved_channels" in metrics:
            self.metrics.append((step, metrics["moved_channels"]))


def test_every_choice_anew_logs_how_many_channels_moved():
    logger, module = Logged(), new_module()
    callback = SparseUpdate(SCHEME, channel_choice="random", rechoose_every=3)
    fit(module, callback, logger=logger, log_every_n_steps=1)
    expected = [
        (step, sum(len(set(module.channels[step][n]) - set(module.channels[step - 1][n])) for n in CHOSEN))
        for step in (3, 6)
    ]
    assert logger.metrics == expected
    assert callback.moved_channels == sum(count for _, count in expected) > 0


def test_a_choice_by_data_is_said(caplog):
    with caplog.at_level(logging.INFO):
        fit(new_module(), SparseUpdate(SCHEME, channel_choice="taylor"))
    assert "SparseUpdate chose the channels of 3 layers by taylor" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rechoose_every": -1}, "rechoose_every is -1: give 0 or more"),
        ({"choice_samples": 0}, "choice_samples is 0: give 1 or more"),
        ({"channel_choice": "norm"}, "channel_choice is 'norm': give one of weight_norm, gradient_norm, fisher, "),
    ],
)
def test_arguments_out_of_their_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        SparseUpdate(SCHEME, **arguments)


@pytest.mark.parametrize(
    "scheme",
    [
        UpdateScheme("block", 4, {"expand.0": 0.5}, {"expand.0": [0, 1, 2, 3]}),
        UpdateScheme("block", 4, {"project": 1.0}),
        UpdateScheme("block", 4),
    ],
    ids=["fixed", "whole", "biases"],
)
def test_where_there_is_nothing_to_choose(scheme):
    with pytest.raises(UserError, match="rechoose_every is 3, but there is nothing to choose: the scheme fixes the ch"):
        fit(new_module(), SparseUpdate(scheme, rechoose_every=3))
    module = fit(new_module(), SparseUpdate(scheme, channel_choice="taylor"), max_epochs=1)
    assert len(module.batches) == 4


@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.05)])
@pytest.mark.parametrize("arguments", [{"rechoose_every": 3}, {"channel_choice": "taylor"}], ids=str)
def test_averaging_of_weights_that_move_is_refused(arguments, make):
    message = "averages slices of weights, whose channels are chosen by data or anew in training: leave it out, or "
    with pytest.raises(UserError, match=f"{type(make()).__name__} {message}"):
        fit(new_module(), SparseUpdate(SCHEME, **arguments), make())


def test_resuming_an_average_of_other_channels_is_refused_and_of_the_same_is_exact(tmp_path):
    whole = fit(new_module(), SparseUpdate(SCHEME), EMAWeightAveraging(decay=0.9), checkpoints(tmp_path))
    path = tmp_path / "epoch=0.ckpt"
    resumed = fit(new_module(), SparseUpdate(SCHEME), EMAWeightAveraging(decay=0.9), ckpt_path=path)
    assert all(torch.equal(tensor, whole.net.state_dict()[name]) for name, tensor in resumed.net.state_dict().items())
    message = "updates other channels than these weights choose, and EMAWeightAveraging has copied the network with"
    with pytest.raises(UserError, match=message):
        fit(new_module(7), SparseUpdate(SCHEME), EMAWeightAveraging(decay=0.9), ckpt_path=path)


class Stream(IterableDataset):
    """Samples that come once."""

    def __iter__(self):
        return iter(TensorDataset(Samples().x, Samples().y))


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        (lambda: DataLoader(Stream(), 8), "Stream"),
        (lambda: {"one": shuffled(), "other": shuffled()}, "dict"),
        (lambda: DataLoader([default_collate([Samples()[i] for i in range(8)])], batch_size=None), "DataLoader"),
    ],
    ids=["stream", "several", "no batches"],
)
def test_loaders_that_cannot_be_read_twice_are_refused(loader, kind):
    message = f"which a {kind} cannot give twice: give the Trainer one DataLoader with batches of a data set that has "
    with pytest.raises(UserError, match=f"channels are chosen by the first training samples, {message}"):
        fit(new_module(), SparseUpdate(SCHEME, channel_choice="taylor"), loader=loader())


def test_batches_without_labels_are_refused():
    class OfDicts(Module):
        def training_step(self, batch, index):
            return super().training_step((batch["x"], batch["y"]), index)

    torch.manual_seed(0)
    samples = [{"x": x, "y": y} for x, y in zip(Samples().x, Samples().y, strict=True)]
    message = "chosen by batches of samples and labels, and the training batch is a dict: give pairs, or choose by we"
    with pytest.raises(UserError, match=message):
        fit(OfDicts(BlockNet()), SparseUpdate(SCHEME, channel_choice="taylor"), loader=DataLoader(samples, 8))
