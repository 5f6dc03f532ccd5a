"""Fine-tunes MobileNetV2 on any folder of image classes under an update scheme that fits a microcontroller.

    uv run recipes/train_image_folder.py --data_dir flowers --weights KERAS_FILE.h5 --scheme sub_tensor \\
        --learning_rate 0.006 --epochs 5

On Flowers-17 (918 training images, 96 px, Keras' weights of width 0.35) that takes about half a minute on one core of
an AMD EPYC and gives 86 % (one seed).
"""

from pathlib import Path
from typing import Any

from microtune.datamodules.image_folder import ImageFolder
from microtune.recipes.training.command_line import flat, run
from microtune.recipes.training.networks import normalization_of, source_of_weights
from microtune.recipes.training.training import train


def main(
    data_dir: Path,
    weights: str = "none",
    network: str = "mobilenet_v2",
    resolution: int = 96,
    epochs: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 2,
    skip_broken: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tunes MobileNetV2 on any folder of image classes under an update scheme that fits a microcontroller.

    Args:
        data_dir: A folder per class with its images; or train/ and test/ (or val/) with a folder per class in each.
        weights: To start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        network: mobilenet_v2, or the .safetensors file of an int8 network, which has its own weights.
        resolution: Height and width of the input in pixels.
        epochs: Passes over the training split.
        batch_size: Samples per step.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Processes that load the data.
        skip_broken: Leave out files that are no images, and say how many.
    """
    arguments = flat(locals())
    data = ImageFolder(
        data_dir,
        resolution,
        batch_size,
        seed,
        normalization=normalization_of(source_of_weights(network, weights)),
        num_workers=num_workers,
        skip_broken=skip_broken,
    )
    return train(data, "train_image_folder", arguments, weights, epochs, batch_size, seed, network=network, **options)


if __name__ == "__main__":
    run(main)
