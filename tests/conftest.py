"""What several tests need."""

import os
import sys
from pathlib import Path

# where Python is told to write no bytecode, each of the many processes of the tests would compile PyTorch anew: 8 s
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache/bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import gc
import multiprocessing
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from PIL import Image

from microtune.modules.int8.files import tensor_shapes
from microtune.modules.int8.graph import (
    InvertedResidual,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
    QuantizedGraph,
)

# the networks of the tests are small, and two busy jobs of two threads each slow one another many times
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    # what the imports and the collected tests hold stays: the collector need not go through it again and again
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """Fills a folder once for all workers of pytest-xdist: ``made_once("cifar", write)`` calls ``write(folder)``.

    It is for every test to read and for none to change.
    """
    common = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        common = common.parent

    def make(name, write):
        folder, made = common / name, common / f"{name}.made"
        with FileLock(common / f"{name}.lock"):
            if not made.exists():
                folder.mkdir()
                write(folder)
                made.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; a test that asks for it is skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared/data"
    if not folder.is_dir():
        pytest.skip("real data not found beside the project: ../shared/data")
    return folder


@pytest.fixture(scope="session")
def fork():
    """What starts processes that have imported all that this one has, which takes most of a small training's time."""
    if torch.cuda.is_available():
        pytest.skip("autograd cannot fork where it has threads for a GPU: run with CUDA_VISIBLE_DEVICES= to hide it")
    return multiprocessing.get_context("fork")


def write_cifar(folder: Path, files: list[str], images: int, num_classes: int, key: str) -> None:
    """Writes files in CIFAR's layout, of images as bright as their label is high."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in files:
        labels = [index % num_classes for index in range(images)]
        pixels = rng.integers(0, 60, (images, 3072)) + np.array(labels)[:, None] * 190 // num_classes
        (folder / name).write_bytes(pickle.dumps({"data": pixels.astype(np.uint8), key: labels}, protocol=2))


@pytest.fixture(scope="session")
def tiny_cifar(made_once) -> Path:
    """A folder in CIFAR-10's layout: 100 training and 20 test images."""

    def write(data_dir):
        folder = data_dir / "cifar-10-batches-py"
        write_cifar(folder, [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"], 20, 10, "labels")
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))

    return made_once("cifar", write)


@pytest.fixture(scope="session")
def tiny_cifar100(made_once) -> Path:
    """A folder in CIFAR-100's layout: 200 training and 200 test images."""

    def write(data_dir):
        folder = data_dir / "cifar-100-python"
        write_cifar(folder, ["train", "test"], 200, 100, "fine_labels")
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))

    return made_once("cifar100", write)


@pytest.fixture(scope="session")
def tiny_images(made_once) -> Path:
    """A folder of three classes with 20 images each."""

    def write(data_dir):
        rng = np.random.default_rng(0)
        for label, name in enumerate(("blue", "green", "red")):
            (data_dir / name).mkdir()
            for number in range(20):
                pixels = rng.integers(0, 100, (40, 36, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 150
                Image.fromarray(pixels).save(data_dir / name / f"{number:02}.png")

    return made_once("pictures", write)


@pytest.fixture(scope="session")
def tiny_imagenet(made_once) -> Path:
    """Folders train/ and val/ with three of ImageNet's classes, 12 and 4 images each."""

    def write(data_dir):
        rng = np.random.default_rng(0)
        for split, images in (("train", 12), ("val", 4)):
            for label, wnid in enumerate(("n01440764", "n02099601", "n15075141")):
                (data_dir / split / wnid).mkdir(parents=True)
                for number in range(images):
                    pixels = rng.integers(0, 100, (40, 36, 3), dtype=np.uint8)
                    pixels[..., label] += 150
                    Image.fromarray(pixels).save(data_dir / split / wnid / f"{number:02}.JPEG")

    return made_once("imagenet", write)


def tone(hertz: float, rng: np.random.Generator, rate_hz: int = 16_000) -> np.ndarray:
    """A second of a tone in noise, which takes the place of a word."""
    seconds = np.arange(rate_hz) / rate_hz
    return 0.3 * np.sin(2 * np.pi * hertz * seconds) + rng.normal(0, 0.01, rate_hz)


@pytest.fixture(scope="session")
def tiny_speech_commands(made_once) -> Path:
    """Speech Commands' layout: ten commands and another word with 6, 2 and 2 clips each for the splits, and noise."""

    def write(data_dir):
        folder = data_dir / "SpeechCommands/speech_commands_v0.02"
        rng = np.random.default_rng(0)
        listed = {"validation": [], "testing": []}
        for number, word in enumerate(("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "bed")):
            (folder / word).mkdir(parents=True)
            for clip in range(10):
                speaker = "aaaaaaaa" if clip < 6 else "bbbbbbbb" if clip < 8 else "cccccccc"
                name = f"{word}/{speaker}_nohash_{clip}.wav"
                soundfile.write(folder / name, tone(300 * (number + 1), rng), 16_000, subtype="PCM_16")
                if clip >= 6:
                    listed["validation" if clip < 8 else "testing"].append(name)
        for name, clips in listed.items():
            (folder / f"{name}_list.txt").write_text("\n".join(clips) + "\n")
        (folder / "_background_noise_").mkdir()
        noise = rng.normal(0, 0.1, 12 * 16_000)
        soundfile.write(folder / "_background_noise_/white_noise.wav", noise, 16_000, subtype="PCM_16")

    return made_once("speech", write)


@pytest.fixture(scope="session")
def tiny_mswc(made_once) -> Path:
    """MSWC's layout: three words each in English and Arabic, with 8 training, 2 validation and 4 test clips."""

    def write(data_dir):
        rng = np.random.default_rng(0)
        for language, words in (("en", ("bed", "cat", "tree")), ("ar", ("واحد", "اثنان", "ثلاثة"))):
            rows = ["SET,LINK,WORD,VALID,SPEAKER,GENDER"]
            for number, word in enumerate(words):
                (data_dir / language / "clips" / word).mkdir(parents=True)
                for clip in range(14):
                    link = f"{word}/common_voice_{language}_{clip}.opus"
                    sound = tone(500 * (number + 1) + 100 * (language == "ar"), rng, 48_000)
                    path = data_dir / language / "clips" / link
                    soundfile.write(path, sound, 48_000, format="OGG", subtype="OPUS")
                    split = "TRAIN" if clip < 8 else "DEV" if clip < 10 else "TEST"
                    rows.append(f"{split},{link},{word},True,{clip},NAN")
            (data_dir / language / f"{language}_splits.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")

    return made_once("mswc", write)


@pytest.fixture
def small_graph() -> QuantizedGraph:
    """An int8 network of 32 px and 10 classes: with and without expansion and addition, padded as PyTorch and Keras."""
    relu = Quantization(6 / 255, -128)
    image, first, second, summed = (Quantization(s, z) for s, z in ((2 / 255, 0), (0.05, -4), (0.04, 7), (0.06, 2)))

    def convolution(in_channels, out_channels, given, output, kernel=1, stride=1, groups=1, padding=(0, 0, 0, 0)):
        return QuantizedConvolution(
            in_channels, out_channels, (kernel, kernel), (stride, stride), padding, groups, given, output
        )

    around, behind = (1, 1, 1, 1), (0, 1, 0, 1)
    blocks = (
        InvertedResidual(
            None,
            convolution(8, 8, relu, relu, kernel=3, groups=8, padding=around),
            convolution(8, 8, relu, first),
            addition=None,
        ),
        InvertedResidual(
            convolution(8, 24, first, relu),
            convolution(24, 24, relu, relu, kernel=3, groups=24, padding=around),
            convolution(24, 8, relu, second),
            addition=summed,
        ),
        InvertedResidual(
            convolution(8, 24, summed, relu),
            convolution(24, 24, relu, relu, kernel=3, stride=2, groups=24, padding=behind),
            convolution(24, 16, relu, second),
            addition=None,
        ),
    )
    return QuantizedGraph(
        name="small-int8",
        input_shape=(3, 32, 32),
        input=image,
        normalization=((128 / 255,) * 3, (0.5,) * 3),
        first_conv=convolution(3, 8, image, relu, kernel=3, stride=2, padding=around),
        blocks=blocks,
        feature_mix=None,
        classifier=QuantizedClassifier(16, 10, input=second, output=None),
    )


@pytest.fixture
def small_tensors(small_graph) -> dict[str, torch.Tensor]:
    """Random weights of the small network, scaled so that most outputs lie within int8 and some saturate."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (dtype, shape) in tensor_shapes(small_graph).items():
        if dtype == torch.int8:
            tensors[name] = torch.randint(-128, 128, shape, dtype=dtype, generator=random)
        elif dtype == torch.int32:
            tensors[name] = torch.randint(-4000, 4001, shape, dtype=dtype, generator=random)
        elif name.endswith(".weight_scales"):
            fan_in = tensors[name.removesuffix("_scales")][0].numel()
            tensors[name] = (torch.rand(shape, generator=random) + 0.5) * 0.02 / fan_in**0.5
        else:
            tensors[name] = torch.randn(shape, generator=random) * 0.1
    return tensors
