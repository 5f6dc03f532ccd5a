"""Fine-tunes MobileNetV2 on CIFAR-10 or CIFAR-100 under an update scheme that fits a microcontroller.

    uv run recipes/train_cifar.py --data_dir data --download --weights KERAS_FILE.h5 \\
        --scheme sub_tensor --learning_rate 0.006

On two cores of an AMD EPYC ten epochs of 5,850 images at 96 px take 71 seconds; from Keras' weights of width 0.35 they
give 84.2 % (3 seeds) with 215 KiB at the peak, where full update gives 83.1 % with 1,016 KiB.
"""

from pathlib import Path
from typing import Any, Literal

from microtune.datamodules.cifar import CIFAR
from microtune.modules.mobilenet_v2 import NORMALIZATION, padding_of_weights
from microtune.recipes.command_line import flat, run
from microtune.recipes.training import train


def main(
    data_dir: Path = Path("data"),
    classes: Literal[10, 100] = 10,
    download: bool = False,
    weights: str = "none",
    resolution: int = 96,
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tunes MobileNetV2 on CIFAR-10 or CIFAR-100 under an update scheme that fits a microcontroller.

    Args:
        data_dir: Folder that holds cifar-10-batches-py or cifar-100-python.
        classes: 10 or 100.
        download: Fetch the data where it is missing.
        weights: To start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        resolution: Height and width of the input in pixels; the 32 px images are enlarged.
        epochs: Passes over the training split.
        batch_size: Samples per step.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Processes that load the data.
    """
    arguments = flat(locals())
    normalization = NORMALIZATION[padding_of_weights(weights)]
    data = CIFAR(
        data_dir, classes, resolution, batch_size, seed, normalization=normalization, download=download,
        num_workers=num_workers,
    )  # fmt: skip
    return train(data, "train_cifar", arguments, weights, epochs, batch_size, seed, **options)


if __name__ == "__main__":
    run(main)
