"""Every training recipe trains an int8 network, says how, and leaves one; what does not suit it is refused."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import yaml

from microtune.datamodules.cifar import CIFAR
from microtune.modules.classifier import Classifier
from microtune.modules.int8.files import read_quantized_network
from microtune.modules.int8.graph import Quantization
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.networks import describe_network

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("train_*.py"))
SPEECH = ("train_mswc", "train_speech_commands")
ONE_EPOCH = {"epochs": 1, "learning_rate": 0.01, "scheme": "sub_tensor"}
MEASURED = ("top1", "top5", "val_top1", "loss", "classes", "train_samples", "val_samples", "test_samples")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def integers(state):
    """The weights and biases of convolutions in a checkpoint."""
    return {name: value for name, value in state.items() if "scales" not in name and "classifier" not in name}


@pytest.fixture
def train(called, tiny_run, write_network, tmp_path):
    """Calls ``train("train_cifar", epochs=2)``: one epoch of the small int8 network."""

    def call(recipe="train_cifar", **changed):
        network = changed.pop("network", None) or write_network(recipe)
        run = tiny_run(recipe) | ONE_EPOCH | {"network": str(network), "out_dir": tmp_path / "run"}
        return called(recipe, **run | changed)

    return call


# ---- what a run leaves


@each_recipe
def test_run(recipe, write_network, tiny_run, as_words, command, weights_of, caplog, report_of, tmp_path):
    caplog.set_level(logging.INFO)
    source, folder = write_network(recipe), tmp_path / "run"
    words = as_words(tiny_run(recipe) | ONE_EPOCH | {"network": source, "out_dir": folder})
    ended = command(recipe, *words)
    assert ended.status == 0, ended.errors
    assert "the int8 network is trained with quantization-aware scaling, its weights in_place" in caplog.messages
    assert f"the trained int8 network: {folder / 'network.safetensors'}\n" in ended.output
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "scheme.json", "last.ckpt", "metrics", "memory.png", "network.safetensors", "report.json")
    }
    config, report = yaml.safe_load((folder / "config.yaml").read_text()), report_of(folder)
    assert (config["network"], config["weights"]) == (str(source), "none")
    assert (report["gradient_scaling"], report["weight_storage"], report["near_zero_channels"]) == (True, "in_place", 0)

    scheme = UpdateScheme.load(folder / "scheme.json")
    assert scheme.network == "small-int8"
    (began, before), (graph, after) = (read_quantized_network(one) for one in (source, folder / "network.safetensors"))
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    names = checkpoint["hyper_parameters"]["class_names"]
    classifier = dataclasses.replace(began.classifier, classes=report["classes"])
    assert graph == dataclasses.replace(began, class_names=tuple(names), classifier=classifier)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [name for name, _ in graph.convolutions()][-scheme.bias_depth :]
    updated = {f"{name}.weight" for name in scheme.weights} | {f"{name}.bias" for name in layers}
    assert moved - updated == {"classifier.weight", "classifier.bias"}
    assert moved & updated
    for name, value in integers(weights_of(folder)).items():
        assert torch.equal(value, after[name.removeprefix("net.")].float()), name


@pytest.mark.parametrize(
    ("options", "how", "reported"),
    [
        ({"gradient_scaling": "false"}, "as --gradient_scaling false says, without", "in_place"),
        ({"momentum": "0.9"}, "with", "in_place"),
        ({"weight_storage": "latent"}, "with", "latent"),
    ],
)
def test_other_ways_to_train_are_said_and_reported(
    options, how, reported, write_network, tiny_run, as_words, command, weights_of, caplog, report_of, tmp_path
):
    caplog.set_level(logging.INFO)
    source, folder = write_network("train_cifar"), tmp_path / "run"
    words = as_words(tiny_run("train_cifar") | ONE_EPOCH | {"network": source, "out_dir": folder} | options)
    assert command("train_cifar", *words).status == 0
    assert f"the int8 network is trained {how} quantization-aware scaling, its weights {reported}" in caplog.messages
    report, is_scaled = report_of(folder), how == "with"
    assert (report["gradient_scaling"], report["weight_storage"]) == (is_scaled, reported)
    assert ("near_zero_channels" in report) is is_scaled

    trained = integers(weights_of(folder)).values()
    assert all(value.abs().max() <= 128 for value in trained if value.ndim > 1)
    assert all(torch.equal(value, value.round()) for value in trained) is (reported == "in_place")
    operations = describe_network(str(source), (3, 32, 32), 10).operations
    state = "momentum" if "momentum" in options else "none"
    counted = PeakMemory(operations, optimizer_state=state, latent_weights=reported == "latent")
    assert report["peak_memory_bytes"] == counted.peak_bytes(UpdateScheme.load(folder / "scheme.json"))


def test_channels_near_zero_are_counted(small_tensors, train, tmp_path):
    """Of a layer whose weight is trained; published models have dozens."""
    scales = small_tensors["blocks.2.pointwise1.weight_scales"]
    scales[[3, 5]] = 4e-9
    small_tensors["blocks.0.pointwise2.weight_scales"][1] = 4e-9  # which the scheme leaves frozen
    UpdateScheme("small-int8", 3, {"blocks.2.pointwise1": 1.0}).save(tmp_path / "scheme.json")
    report = train(scheme=str(tmp_path / "scheme.json"))
    assert report["near_zero_channels"] == 2
    _, after = read_quantized_network(tmp_path / "run/network.safetensors")
    weight = "blocks.2.pointwise1.weight"
    is_same = (after[weight] == small_tensors[weight]).flatten(1).all(1)
    assert is_same[[3, 5]].all()
    assert not is_same.all()


# ---- what is read again


@pytest.mark.parametrize(
    "options", [{}, {"weight_storage": "latent"}, {"weight_storage": "latent", "ema_decay": 0.5}], ids=str
)
def test_report_is_about_the_network_that_is_written(options, train, tmp_path):
    """As a device would run it, although copies in floating point or averages were trained."""
    report = train(**options)
    again = train(network=tmp_path / "run/network.safetensors", evaluate_only=True, out_dir=tmp_path / "again")
    assert {name: again[name] for name in MEASURED} == {name: report[name] for name in MEASURED}
    assert again.keys().isdisjoint({"gradient_scaling", "weight_storage", "near_zero_channels", "peak_memory_bytes"})
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"config.yaml", "metrics", "report.json"}


def test_written_network_is_trained_further(train, tmp_path):
    """With its classifier, if the classes are the same; learning rate 0 leaves what training starts from."""
    train()
    first = tmp_path / "run/network.safetensors"
    train(network=first, learning_rate=0.0, out_dir=tmp_path / "same")
    assert (tmp_path / "same/network.safetensors").read_bytes() == first.read_bytes()
    train("train_image_folder", network=first, learning_rate=0.0, resolution=40, out_dir=tmp_path / "other")
    (_, before), (graph, after) = (
        read_quantized_network(one) for one in (first, tmp_path / "other/network.safetensors")
    )
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert (graph.class_names, graph.input_shape) == (("blue", "green", "red"), (3, 40, 40))
    assert after["classifier.weight"].shape == (3, 16)


def test_what_is_forgotten_is_measured(train, tmp_path):
    """Beside the network lies the run's config.yaml, which says what it knows."""
    earlier = train("train_mswc", out_dir=tmp_path / "arabic")
    network = tmp_path / "arabic/network.safetensors"
    report = train("train_mswc", network=network, languages="en", learning_rate=0.0)
    assert report["earlier_top1_before"] == report["earlier_top1_after"] == earlier["top1"]


def test_evaluation_is_of_the_int8_classifier(small_graph, small_tensors, write_network, train, tiny_cifar):
    """Its logits are integers, often equal, and the first of the best five counts."""
    generator = torch.Generator().manual_seed(1)
    small_tensors["classifier.weight_scales"] = torch.full((10,), 0.002)
    small_tensors["classifier.weight"] = torch.randint(-128, 128, (10, 16), dtype=torch.int8, generator=generator)
    small_tensors["classifier.bias"] = torch.randint(-2000, 2000, (10,), dtype=torch.int32, generator=generator)
    coarse = dataclasses.replace(small_graph.classifier, output=Quantization(3.0, -3))
    source = write_network("train_cifar", classifier=coarse)
    report = train(network=source, evaluate_only=True)

    graph, tensors = read_quantized_network(source)
    whole, trainable = QuantizedNetwork(graph).eval(), QuantizedNetwork(graph, 10).eval()
    data = CIFAR(tiny_cifar, resolution=32, batch_size=20, normalization=graph.normalization)
    data.setup()
    ((samples, labels),) = (data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader())
    losses = {}
    for network in (whole, trainable):
        load_quantized_tensors(network, tensors)
        with torch.no_grad():
            logits = network(samples)
        losses[network] = torch.nn.functional.cross_entropy(logits, labels).item()
        if network is whole:
            assert torch.equal(logits / 3, (logits / 3).round())
            best = logits.topk(5).indices[:, 0]
            assert report["top1"] == pytest.approx((best == labels).float().mean().item())
            assert (logits == logits.max(1, keepdim=True).values).sum(1).max() > 1  # some are equal indeed
    assert report["loss"] == pytest.approx(losses[whole], rel=1e-5)
    assert losses[whole] != pytest.approx(losses[trainable], rel=1e-3)


def test_checkpoint_is_an_int8_network(train, weights_of, tmp_path):
    """Lightning's own loading rebuilds it, from the graph in its hyperparameters."""
    train()
    module = Classifier.load_from_checkpoint(tmp_path / "run/last.ckpt").eval()
    graph, tensors = read_quantized_network(tmp_path / "run/network.safetensors")
    network = QuantizedNetwork(graph, 10).eval()
    load_quantized_tensors(network, tensors)
    samples = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(samples), network(samples))


def test_scheme_of_the_network_that_it_was(train, tmp_path):
    """A scheme for the network in floating point goes by the names of the int8 one."""
    scheme = UpdateScheme("small", 4, {"features.3.conv.0.0": 0.5, "features.2.conv.2": 1.0})
    scheme.save(tmp_path / "scheme.json")
    train(scheme=str(tmp_path / "scheme.json"))
    kept = UpdateScheme.load(tmp_path / "run/scheme.json")
    assert kept == UpdateScheme("small-int8", 4, {"blocks.2.pointwise1": 0.5, "blocks.1.pointwise2": 1.0})


# ---- the same, whether stopped or not


@pytest.mark.parametrize("storage", ["in_place", "latent"])
def test_resumed_run_ends_as_one_never_stopped(storage, train, interrupt, weights_of, tmp_path):
    options = {"epochs": 2, "weight_storage": storage, "momentum": 0.9}
    whole = train(**options, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train(**options)
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["epoch"] == 0
    assert not (tmp_path / "run/network.safetensors").exists()
    resumed = train(**options, resume=True)
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    names = ("whole/network.safetensors", "run/network.safetensors")
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


def test_resume_with_the_other_storage_is_refused(train, interrupt, tiny_run, as_words, command, tmp_path):
    interrupt(epoch=0)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train(weight_storage="in_place")
    config = tmp_path / "run/config.yaml"
    ended = command("train_cifar", "--config", config, "--resume", "--weight_storage", "latent")
    assert ended.status == 2
    assert "was started with weight_storage in_place, not latent" in ended.errors


# ---- wrong input


@pytest.fixture
def words_of(tiny_run, as_words, write_network):
    """Words of a run of an int8 network that would end well."""

    def words(recipe, network=None, **changed):
        network = network or write_network(recipe)
        return [recipe, *as_words(tiny_run(recipe) | ONE_EPOCH | {"network": network, "out_dir": "out"} | changed)]

    return words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--weights", "none.ckpt"],
            r"small\.safetensors is an int8 network, which has its own weights: leave --weights out",
        ),
        (["--width", "0.35"], r"small\.safetensors says what it is: leave --width and --head_convolution out"),
        (["--head_convolution"], r"small\.safetensors says what it is: leave --width and --head_convolution out"),
        (["--scheme", "none"], "--scheme none trains with batch norm, which an int8 network has not: give --scheme f"),
        (["--precision", "bf16-mixed"], "precision is bf16-mixed, and an int8 network is .* in float32.*: give 32-tr"),
        (["--precision", "16-true"], "precision is 16-true, and an int8 network is simulated in float32"),
        (["--optimizer", "adamw"], "optimizer is adamw, .* so that int8 weights hardly move: give sgd"),
        (["--gradient_clip_norm", "1"], "gradient_clip_norm would measure .* gradients in integers: leave it out"),
        (
            ["--ema_decay", "0.9"],
            "ema_decay averages weights in floating point: give --weight_storage latent, or leave",
        ),
        (["--network", "resnet18"], r"network is 'resnet18': give mobilenet_v2, or the \.safetensors file of an int8"),
        (["--network", "nowhere.safetensors"], r"nowhere\.safetensors: there is no such file: make one with recipes/q"),
        (["--network", "mobilenet_v2", "--evaluate_only"], "give them with --weights, or an int8 --network"),
        (["--weight_storage", "both"], "weight_storage is both: give one of 'latent', 'in_place'"),
        (["--gradient_scaling", "perhaps"], "gradient_scaling is perhaps: give true or false"),
        (["--sram_bytes", "40000", "--scheme", "full"], r"one training step needs .* but custom has 7\.1 KiB"),
    ],
)
def test_argument(words, message, refused, words_of):
    refused(message, *words_of("train_cifar"), *words)


def test_int8_network_as_weights(refused, tiny_run, as_words, write_network):
    source = write_network("train_cifar")
    words = as_words(tiny_run("train_cifar") | {"out_dir": "out"})
    refused(f"{source} is a whole int8 network: give it as --network", "train_cifar", *words, "--weights", source)


@each_recipe
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "it is cut short or no safetensors file"),
        (lambda content: b"", "it is cut short or no safetensors file"),
        (
            lambda content: content.replace(b"microtune-int8", b"microtune-int9"),
            "it is a safetensors file, but not of a",
        ),
        (lambda content: content.replace(b"first_conv.bias", b"first_conv.bios"), "tensor first_conv.bias is missing"),
    ],
    ids=["cut", "empty", "foreign", "without a tensor"],
)
def test_damaged_network(recipe, damage, message, refused, words_of, write_network, here):
    (here / "net.safetensors").write_bytes(damage(write_network(recipe).read_bytes()))
    refused(rf"net\.safetensors: {message}", *words_of(recipe, "net.safetensors"))


def test_scheme_of_another_network(refused, words_of, scheme_file):
    message = "the scheme is for mobilenet_v2-w0.35, but the network is small-int8"
    refused(message, *words_of("train_cifar", scheme=scheme_file))


def test_evaluation_needs_the_data_that_was_learnt(refused, words_of, write_network):
    words = [*words_of("train_image_folder", write_network("train_image_folder")), "--evaluate_only"]
    refused(r"small\.safetensors knows 10 classes, and the data has 3: give the data it learnt", *words)
    named = write_network("train_cifar", class_names=tuple("abcdefghij"))
    message = (
        r"knows a, b, c, \.\.\. \(10\), the data has class 0, class 1, class 2, \.\.\. \(10\): give the data it le"
    )
    refused(message, *words_of("train_cifar", named), "--evaluate_only")


@each_recipe
def test_data_of_another_kind(recipe, refused, words_of, write_network):
    if recipe in SPEECH:
        of_images = write_network("train_cifar")
        refused(r"small\.safetensors takes 3 channels, and the data has 1: give another", *words_of(recipe, of_images))
    else:
        of_speech = write_network("train_mswc")
        message = r"small\.safetensors was made for inputs of shape \(1, 97, 40\), not for images: give another"
        refused(message, *words_of(recipe, of_speech))


@pytest.mark.parametrize("recipe", SPEECH)
def test_other_spectrograms(recipe, refused, words_of):
    known = r"small\.safetensors was trained on spectrograms of shape \(1, 97, 40\), not"
    refused(rf"{known} \(1, 97, 32\): give its n_mels and hop_ms", *words_of(recipe), "--n_mels", 32)
    refused(rf"{known} \(1, 49, 40\): give its n_mels and hop_ms", *words_of(recipe), "--hop_ms", 20)
