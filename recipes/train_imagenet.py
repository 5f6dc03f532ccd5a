"""Trains MobileNetV2 on ImageNet from scratch, fine-tunes it under an update scheme, or tests weights.

    uv run recipes/train_imagenet.py --data_dir imagenet --head_convolution true --weights torchvision --evaluate_only
    uv run recipes/train_imagenet.py --data_dir imagenet --width 0.35 --resolution 128 --batch_size 256 --epochs 150 \\
        --learning_rate 0.8 --num_workers 16 --devices 8 --strategy ddp --precision bf16-mixed --compile
    uv run recipes/train_imagenet.py --data_dir imagenet --weights runs/train_imagenet/20261120-100000/last.ckpt \\
        --scheme recipes/schemes/mobilenet_v2-w0.35_lin2022_99kb.json --resolution 128 --allow_oversize --epochs 1

The first takes half a minute on two cores of an AMD EPYC for 1,000 images and gives 81.4 % there. A classifier of 1000
classes needs more SRAM for its update than any microcontroller of the table has: hence --allow_oversize.
"""

from pathlib import Path
from typing import Any

from microtune.datamodules.imagenet import ImageNet
from microtune.recipes.training.command_line import flat, run
from microtune.recipes.training.networks import normalization_of, source_of_weights
from microtune.recipes.training.training import train


def main(
    data_dir: Path = Path("data/imagenet"),
    weights: str = "none",
    network: str = "mobilenet_v2",
    resolution: int = 224,
    epochs: int = 150,
    batch_size: int = 256,
    seed: int = 0,
    num_workers: int = 2,
    smallest_crop: float = 0.08,
    skip_broken: bool = False,
    evaluate_only: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains MobileNetV2 on ImageNet from scratch, fine-tunes it under an update scheme, or tests weights.

    Args:
        data_dir: Folder that holds train/ and val/ with a folder per wnid in each, or the original archives.
        weights: To start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        network: mobilenet_v2, or the .safetensors file of an int8 network, which has its own weights.
        resolution: Height and width of the input in pixels.
        epochs: Passes over the training split.
        batch_size: Samples per step and device.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Processes that load the data.
        smallest_crop: Smallest part of a training image that is shown, as a fraction of its area; small networks do
            better with 0.25.
        skip_broken: Leave out files that are no images, and say how many; decodes every file once.
        evaluate_only: Train nothing: test the weights as they are.
    """
    arguments = flat(locals())
    data = ImageNet(
        data_dir,
        resolution,
        batch_size,
        seed,
        smallest_crop=smallest_crop,
        normalization=normalization_of(source_of_weights(network, weights)),
        num_workers=num_workers,
        skip_broken=skip_broken,
        evaluate_only=evaluate_only,
    )
    return train(
        data, "train_imagenet", arguments, weights, epochs, batch_size, seed,
        scratch_defaults={"ema_decay": 0.9999}, evaluate_only=evaluate_only, network=network, **options,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
