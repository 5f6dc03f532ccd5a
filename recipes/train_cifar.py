"""Fine-tunes MobileNetV2 on CIFAR-10 or CIFAR-100 under an update scheme that fits a microcontroller.

    uv run recipes/train_cifar.py --data_dir data --download --weights KERAS_FILE.h5 \\
        --scheme sub_tensor --learning_rate 0.006

On two cores of an AMD EPYC ten epochs of 5,850 images at 96 px take 71 seconds; from Keras' weights of width 0.35 they
give 84.2 % (3 seeds) with 215 KiB at the peak, where full update gives 83.1 % with 1,016 KiB.
"""

from pathlib import Path
from typing import Any, Literal

from microtune.datamodules.cifar import CIFAR
from microtune.datamodules.option_names import AugmentationName
from microtune.recipes.training.command_line import flat, run
from microtune.recipes.training.networks import normalization_of, source_of_weights
from microtune.recipes.training.training import train


def main(
    data_dir: Path = Path("data"),
    classes: Literal[10, 100] = 10,
    download: bool = False,
    weights: str = "none",
    network: str = "mobilenet_v2",
    resolution: int = 96,
    augmentation: AugmentationName = "shift",
    validation_fraction: float = 0.1,
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
        network: mobilenet_v2, or the .safetensors file of an int8 network, which has its own weights.
        resolution: Height and width of the input in pixels; the 32 px images are enlarged.
        augmentation: Of the training images: shift (moved and mirrored), crop (a random part of 8 to 100 % of the area,
            mirrored, other colours; what is tested is the middle 87.5 %, as in the paper's code) or none.
        validation_fraction: Part of the training images that is held out for validation; 0 for none.
        epochs: Passes over the training split.
        batch_size: Samples per step.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Processes that load the data.
    """
    arguments = flat(locals())
    normalization = normalization_of(source_of_weights(network, weights))
    data = CIFAR(
        data_dir, classes, resolution, batch_size, seed, augmentation, normalization=normalization, download=download,
        num_workers=num_workers, validation_fraction=validation_fraction,
    )  # fmt: skip
    return train(data, "train_cifar", arguments, weights, epochs, batch_size, seed, network=network, **options)


if __name__ == "__main__":
    run(main)
