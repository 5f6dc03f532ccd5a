"""Defaults and refusals of the training recipes: a pure function of their options."""

import builtins
import io
import os

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.training.options import (
    BudgetOptions,
    DeviceOptions,
    Int8Options,
    NetworkOptions,
    OptimizationOptions,
    RunOptions,
)
from microtune.recipes.training.plan import plan_training

GROUPS = (NetworkOptions, BudgetOptions, OptimizationOptions, Int8Options, DeviceOptions, RunOptions)
TRAINING = {"epochs": 3, "batch_size": 16, "seed": 0, "num_workers": 0}
OF_A_RECIPE = {*TRAINING, "rate_from_scratch", "ema_decay_from_scratch"}
FROM_SCRATCH = {"momentum": 0.9, "weight_decay": 4e-5, "label_smoothing": 0.1, "learning_rate": 0.1 / 256 * 16}
UNDER_A_SCHEME = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "learning_rate": 0.1 / 256 * 16}
SPEECH = {"rate_from_scratch": 0.1 * 16 / 32}


def planned(**flat):
    """The plan of flat options, as the command line has them."""
    groups = [
        group(**{name: flat[name] for name in group.__dataclass_fields__.keys() & flat.keys()}) for group in GROUPS
    ]
    return plan_training(*groups, **TRAINING | {name: flat[name] for name in OF_A_RECIPE & flat.keys()})


@pytest.mark.parametrize(
    ("weights", "scheme", "expected"),
    [
        ("none", None, FROM_SCRATCH),
        ("none", "none", FROM_SCRATCH),
        ("none", "sub_tensor", UNDER_A_SCHEME),
        ("last.ckpt", None, UNDER_A_SCHEME),
        ("last.ckpt", "classifier", UNDER_A_SCHEME),
        ("last.ckpt", "none", FROM_SCRATCH),
        ("torchvision", None, UNDER_A_SCHEME),
    ],
)
def test_defaults(weights, scheme, expected):
    plan = planned(weights=weights, scheme=scheme)
    assert plan.hyperparameters == expected | {"optimizer": "sgd", "warmup_fraction": 0.1}
    assert (plan.scheme is None) == (expected is FROM_SCRATCH)
    assert plan.averaging_decay(train_samples=10**9) == 0
    assert plan.device.name == "stm32f746"


def test_default_scheme_of_weights_is_sub_tensor_and_of_an_int8_network_too():
    assert planned(weights="last.ckpt").scheme == "sub_tensor"
    plan = planned(network="network.safetensors")
    assert (plan.scheme, plan.source, plan.trains_int8) == ("sub_tensor", "network.safetensors", True)


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
@pytest.mark.parametrize(
    "given",
    [
        {"momentum": 0.5, "weight_decay": 0.01, "label_smoothing": 0.2, "learning_rate": 0.03},
        {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "learning_rate": 0.0},
    ],
)
def test_given_values_win_and_zero_is_one(given, scheme):
    assert planned(scheme=scheme, **given).hyperparameters.items() >= given.items()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({**SPEECH}, 0.1 * 16 / 32),
        ({**SPEECH, "learning_rate": 0.02}, 0.02),
        ({**SPEECH, "scheme": "classifier"}, 0.1 / 256 * 16),
        ({**SPEECH, "scheme": "classifier", "accumulate_batches": 2}, 0.1 / 256 * 32),
        ({**SPEECH, "optimizer": "adamw"}, 0.001),
        ({**SPEECH, "optimizer": "adamw", "scheme": "classifier"}, 0.001),
        ({**SPEECH, "weights": "last.ckpt", "scheme": "none"}, 0.1 / 256 * 16),
    ],
)
def test_learning_rate(options, expected):
    """Speech from scratch has its own, of SGD."""
    assert planned(**options).hyperparameters["learning_rate"] == expected


@pytest.mark.parametrize(
    ("options", "samples", "decay"),
    [
        ({}, 16, 3 / 13),  # one step an epoch
        ({}, 10**9, 0.9999),
        ({"accumulate_batches": 2}, 33, 6 / 16),
        ({"ema_decay": 0}, 16, 0),
        ({"ema_decay": 0.5}, 16, 0.5),
        ({"scheme": "classifier"}, 16, 0),
        ({"weights": "last.ckpt"}, 16, 0),
    ],
)
def test_default_average_of_weights_is_shorter_in_a_short_training(options, samples, decay):
    assert planned(ema_decay_from_scratch=0.9999, **options).averaging_decay(samples) == decay


def test_memory_that_the_training_holds_is_counted():
    for options, counted in (
        ({"scheme": "full"}, ("none", False, False)),
        ({"scheme": "full", "momentum": 0.9}, ("momentum", False, False)),
        ({"scheme": "full", "optimizer": "adamw"}, ("adam", False, False)),
        ({"scheme": "full", "accumulate_batches": 2}, ("none", True, False)),
        ({"network": "a.safetensors", "weight_storage": "latent"}, ("none", False, True)),
        ({"weights": "last.ckpt", "weight_storage": "latent"}, ("none", False, False)),
    ):
        account = planned(**options).peak_memory(operations=None)
        assert (account.optimizer_state, account.gradient_accumulation, account.latent_weights) == counted


def test_microcontroller_is_the_default_unless_another_is_described():
    assert planned(sram_bytes=100_000).device.name == "custom"
    assert planned(mcu="rp2040", sram_bytes=100_000).device.sram_bytes == 100_000


def test_what_is_only_tested_has_no_scheme():
    plan = planned(weights="last.ckpt", evaluate_only=True, rechoose_every=3)
    assert (plan.scheme, plan.rechosen_by, plan.trains_int8) == (None, None, False)
    assert not planned(network="network.safetensors", evaluate_only=True).trains_int8


INT8 = {"network": "network.safetensors"}
REFUSED = [
    ({"epochs": 0}, "^epochs is 0: give 1 or more$"),
    ({"seed": -1}, "^seed is -1: give 0 or more, at most 4294967295$"),
    ({"num_workers": -1}, "^num_workers is -1: give 0 or more$"),
    ({"momentum": 1.5}, "^momentum is 1.5: give 0 or more, at most 1$"),
    ({"learning_rate": float("nan")}, "^learning_rate is nan: give 0 or more$"),
    ({"num_nodes": 0}, "^num_nodes is 0: give 1 or more$"),
    ({"rechoose_every": -1}, "^rechoose_every is -1: give 0 or more$"),
    ({"choice_samples": 0}, "^choice_samples is 0: give 1 or more$"),
    (
        {"network": "resnet18"},
        "^network is 'resnet18': give mobilenet_v2, or the .safetensors file of an int8 netw",
    ),
    ({**INT8, "weights": "a.ckpt"}, "^network.safetensors is an int8 network, which has its own weights: leave --weig"),
    ({**INT8, "width": 0.5}, "^network.safetensors says what it is: leave --width and --head_convolution out$"),
    ({**INT8, "head_convolution": True}, "^network.safetensors says what it is: leave --width and --head_convolution"),
    ({"weights": "a.safetensors"}, "^a.safetensors is a whole int8 network: give it as --network$"),
    ({"evaluate_only": True}, "^evaluate_only tests weights: give them with --weights, or an int8 --network$"),
    ({"resume": True}, "^--resume goes on with the run in a folder: give it with --out_dir$"),
    ({"mcu": "stm32f745"}, "stm32f745"),
    (
        {"scheme": "sub_tensr"},
        "^unknown scheme 'sub_tensr': give a JSON file or one of classifier, biases, ",
    ),
    ({"batch_size": 1}, "^batch_size is 1, and batch norm has no statistics of one sample: give 2 or more$"),
    (
        {**INT8, "scheme": "none"},
        "^--scheme none trains with batch norm, which an int8 network has not: give --scheme ",
    ),
    ({**INT8, "precision": "bf16-mixed"}, "^precision is bf16-mixed, and an int8 network is simulated in float32"),
    ({**INT8, "optimizer": "adamw"}, "^optimizer is adamw, whose steps are as long in integers as in real numbers"),
    ({**INT8, "gradient_clip_norm": 1.0}, "^gradient_clip_norm would measure an int8 network's gradients in integers"),
    ({**INT8, "ema_decay": 0.9}, "^ema_decay averages weights in floating point: give --weight_storage latent, or"),
    ({"scheme": "sub_tensor", "rechoose_every": 3, "compile": True}, "^rechoose_every is 3, and a compiled network wo"),
    ({"scheme": "sub_tensor", "rechoose_every": 3, "ema_decay": 0.9}, "^ema_decay is 0.9, and averages slices of weig"),
    ({"scheme": "sub_tensor", "channel_choice": "taylor", "ema_decay": 0.9}, "^ema_decay is 0.9, and averages slices"),
    *(
        ({"scheme": scheme, "rechoose_every": 3}, "^rechoose_every is 3, but there is nothing to choose: give a --sche")
        for scheme in ("none", "classifier", "biases", "last_layers", "full")
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1, "weights": "a.ckpt", "evaluate_only": True, "scheme": "none"}, {**INT8, "ema_decay": 0}],
)
def test_not_refused(options):
    planned(**options)


def test_plan_touches_no_disk(monkeypatch):
    """Nothing is asked of the files that it names."""

    def touched(*_, **__):
        raise AssertionError("the disk was touched")

    with monkeypatch.context() as patch:
        for module, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "open"), (os, "scandir")):
            patch.setattr(module, name, touched)
        planned(weights="missing.ckpt", scheme="missing.json", out_dir=os.curdir)
        planned(network="missing.safetensors")
