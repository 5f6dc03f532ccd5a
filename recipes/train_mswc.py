"""Lets a network that knows some spoken words learn others, of the Multilingual Spoken Words Corpus (MSWC).

The device's own story: a network that was trained on one vocabulary or language meets another, with few clips per
word, and learns it under an update scheme that fits a microcontroller. First it is trained from scratch, then adapted:

    uv run recipes/train_mswc.py --data_dir mswc --languages en --epochs 80 --out_dir runs/english
    uv run recipes/train_mswc.py --data_dir mswc --languages ar --weights runs/english/last.ckpt \\
        --learning_rate 0.4 --epochs 30

From 13 English words (80 epochs of 845 clips, three minutes on one core of an AMD EPYC) to 40 Arabic ones (30 epochs of
863 clips, one minute) gives 81 % (3 seeds) with 285 KiB at the peak, where the classifier alone gives 60 %.
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from microtune.datamodules.mswc import MSWC
from microtune.datamodules.option_names import CacheName
from microtune.datamodules.speech_commands import SpeechCommands
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import flat, listed, run
from microtune.recipes.training.networks import source_of_weights
from microtune.recipes.training.speech import LEARNING_RATE_FROM_SCRATCH, check_spectrograms
from microtune.recipes.training.training import train

log = logging.getLogger(__name__)


def main(
    data_dir: Path = Path("data/mswc"),
    languages: str = "en",
    words: str | None = None,
    num_words: int | None = None,
    unknown: bool = False,
    shots: int | None = None,
    splits_dir: Path | None = None,
    noise_dir: Path | None = None,
    archives: str | None = None,
    weights: str = "none",
    network: str = "mobilenet_v2",
    forgetting: bool = True,
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
    """Lets a network that knows some spoken words learn others, of the Multilingual Spoken Words Corpus (MSWC).

    Args:
        data_dir: Folder that holds a folder per language, such as en/clips.
        languages: Languages, separated by commas: en or en,ar.
        words: Words to learn, separated by commas.
        num_words: Learn that many of the most frequent words; by default all.
        unknown: Add a class for all other words.
        shots: Training clips per word; by default all.
        splits_dir: Folder of the csv files, where they do not lie beside the audio.
        noise_dir: Folder of WAV files with background noise to mix into training clips; by default it is generated.
        archives: Archives to unpack into data_dir first, separated by commas.
        weights: To start from: none (from scratch), or the .ckpt of an earlier run on spoken words.
        network: mobilenet_v2, or the .safetensors file of an int8 network, which has its own weights.
        forgetting: Test the earlier words too, before and after, where weights lie beside their config.yaml.
        n_mels: Bands of the log-mel spectrogram.
        hop_ms: Milliseconds between its frames.
        epochs: Passes over the training split.
        batch_size: Clips per step.
        seed: Of the fresh classifier, the chosen shots, the order of the clips and their augmentation.
        num_workers: Processes that load the data; decoded clips need none.
        cache: Where decoded clips are kept: memory or disk, 32 kB each.
        cache_dir: Folder for those on disk; by default in the user's cache folder.
        skip_broken: Leave out files that cannot be decoded, and say how many.
    """
    arguments = flat(locals())
    source = source_of_weights(network, weights)
    check_spectrograms(source, n_mels, hop_ms)
    data = words_to_learn(arguments)
    earlier_data = earlier_words(source) if forgetting and not options.get("evaluate_only") else None
    return train(
        data, "train_mswc", arguments, weights, epochs, batch_size, seed,
        scratch_defaults={"learning_rate": LEARNING_RATE_FROM_SCRATCH * batch_size / 32}, earlier_data=earlier_data,
        network=network, **options,
    )  # fmt: skip


def words_to_learn(arguments: dict[str, Any]) -> MSWC:
    """The data module that this recipe's arguments, or the ``config.yaml`` of a run, describe."""
    same = ("num_words", "unknown", "shots", "batch_size", "seed", "n_mels", "hop_ms", "cache", "skip_broken")
    paths = {name: arguments[name] and Path(arguments[name]) for name in ("splits_dir", "noise_dir", "cache_dir")}
    return MSWC(
        arguments["data_dir"],
        listed(arguments["languages"]),
        words=listed(arguments["words"]),
        archives=[Path(name) for name in listed(arguments["archives"]) or []],
        num_workers=arguments["num_workers"],
        **paths,
        **{name: arguments[name] for name in same},
    )


def earlier_words(weights: str) -> LightningDataModule | None:
    """What the run that wrote ``weights`` had learnt, by the ``config.yaml`` beside them; None if that is not known."""
    if weights == "none":
        return None
    config = Path(weights).expanduser().with_name("config.yaml")
    try:
        earlier = yaml.safe_load(config.read_text(encoding="utf-8"))
        data = commands_learnt(earlier) if "task" in earlier else words_to_learn(earlier | {"archives": None})
        data.setup()
    except (OSError, yaml.YAMLError, KeyError, TypeError, UserError) as error:
        reason = f"{config} has no {error}" if isinstance(error, KeyError) else error
        log.warning("what is forgotten is not measured: %s", reason)
        return None
    return data


def commands_learnt(arguments: dict[str, Any]) -> SpeechCommands:
    """The data module that the ``config.yaml`` of a run of ``train_speech_commands.py`` describes."""
    same = ("task", "version", "n_mels", "hop_ms", "cache", "skip_broken")
    cache_dir = arguments["cache_dir"] and Path(arguments["cache_dir"])
    return SpeechCommands(arguments["data_dir"], cache_dir=cache_dir, **{name: arguments[name] for name in same})


if __name__ == "__main__":
    run(main)
