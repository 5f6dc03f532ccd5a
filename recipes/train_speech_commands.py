"""Trains MobileNetV2 on Google Speech Commands, from scratch or under an update scheme that fits a microcontroller.

    uv run recipes/train_speech_commands.py --data_dir data --download --task words12

From scratch that is 120 epochs: on two cores of an AMD EPYC 167 seconds for the ten commands with 952 training clips,
which give 90 % (3 seeds). The whole data set has many times as many clips, and needs fewer epochs.
"""

from pathlib import Path
from typing import Any, Literal

from microtune.datamodules.option_names import CacheName, Task
from microtune.datamodules.speech_commands import SpeechCommands
from microtune.recipes.training.command_line import flat, run
from microtune.recipes.training.networks import source_of_weights
from microtune.recipes.training.speech import LEARNING_RATE_FROM_SCRATCH, check_spectrograms
from microtune.recipes.training.training import train


def main(
    data_dir: Path = Path("data"),
    task: Task = "words12",
    version: Literal[1, 2] = 2,
    download: bool = False,
    weights: str = "none",
    network: str = "mobilenet_v2",
    n_mels: int = 40,
    hop_ms: int = 10,
    epochs: int = 120,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 0,
    cache: CacheName = "memory",
    cache_dir: Path | None = None,
    skip_broken: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains MobileNetV2 on Google Speech Commands, from scratch or under an update scheme that fits an MCU.

    Args:
        data_dir: Folder that holds SpeechCommands/speech_commands_v0.02.
        task: words10 (the ten commands), words12 (and _unknown_ and _silence_) or all.
        version: 1 or 2 of the data.
        download: Fetch the data (2.4 GB) where it is missing.
        weights: To start from: none, or a .ckpt file.
        network: mobilenet_v2, or the .safetensors file of an int8 network, which has its own weights.
        n_mels: Bands of the log-mel spectrogram.
        hop_ms: Milliseconds between its frames.
        epochs: Passes over the training split.
        batch_size: Clips per step.
        seed: Of the fresh classifier, the order of the clips and their augmentation.
        num_workers: Processes that load the data; decoded clips need none.
        cache: Where decoded clips are kept: memory or disk, 32 kB each.
        cache_dir: Folder for those on disk; by default in the user's cache folder.
        skip_broken: Leave out files that cannot be decoded, and say how many.
    """
    arguments = flat(locals())
    check_spectrograms(source_of_weights(network, weights), n_mels, hop_ms)
    data = SpeechCommands(
        data_dir, task, version, batch_size, seed, n_mels=n_mels, hop_ms=hop_ms, cache=cache, cache_dir=cache_dir,
        download=download, skip_broken=skip_broken, num_workers=num_workers,
    )  # fmt: skip
    return train(
        data, "train_speech_commands", arguments, weights, epochs, batch_size, seed,
        scratch_defaults={"learning_rate": LEARNING_RATE_FROM_SCRATCH * batch_size / 32}, network=network, **options,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
