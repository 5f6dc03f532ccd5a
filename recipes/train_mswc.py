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
from typing import TYPE_CHECKING, Any

import yaml

from microtune.datamodules.option_names import CacheName
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import flat, listed, run_recipe
from microtune.recipes.training.options import (
    BudgetOptions,
    DeviceOptions,
    Int8Options,
    NetworkOptions,
    OptimizationOptions,
    RunOptions,
)
from microtune.recipes.training.plan import check_named_files, plan_training
from microtune.recipes.training.speech import LEARNING_RATE_FROM_SCRATCH, check_spectrograms

if TYPE_CHECKING:
    from microtune.datamodules.contract import ClassificationData
    from microtune.datamodules.mswc import MSWC
    from microtune.datamodules.speech_commands import SpeechCommands

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
    network: NetworkOptions = NetworkOptions(),
    budget: BudgetOptions = BudgetOptions(),
    optimization: OptimizationOptions = OptimizationOptions(),
    int8: Int8Options = Int8Options(),
    devices: DeviceOptions = DeviceOptions(),
    run: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Lets a network that knows some spoken words learn others, of the Multilingual Spoken Words Corpus (MSWC).

    Args:
        data_dir: Folder that holds a folder per language, such as en/clips.
        languages: Languages, separated by commas: en or en,ar.
        words: Words to learn, separated by commas.
        num_words: Number of words to learn, the most frequent ones; by default all.
        unknown: Whether to add a class for all other words.
        shots: Number of training clips per word; by default all.
        splits_dir: Folder of the csv files, where they do not lie beside the audio.
        noise_dir: Folder of WAV files with background noise to mix into training clips; by default it is generated.
        archives: Archives to unpack into data_dir first, separated by commas.
        forgetting: Whether to test the earlier words too, before and after, where weights lie beside their config.yaml.
        n_mels: Number of bands of the log-mel spectrogram.
        hop_ms: Milliseconds between its frames.
        epochs: Number of passes over the training split.
        batch_size: Number of clips per step.
        seed: Seed of the fresh classifier, the chosen shots, the order of the clips and their augmentation.
        num_workers: Number of processes that load the data; decoded clips need none.
        cache: Place of decoded clips: memory or disk, 32 kB each.
        cache_dir: Folder for those on disk; by default in the user's cache folder.
        skip_broken: Whether to leave out files that cannot be decoded, and say how many.
    """
    arguments = flat(locals())
    plan = plan_training(
        network, budget, optimization, int8, devices, run,
        epochs=epochs, batch_size=batch_size, seed=seed, num_workers=num_workers,
        rate_from_scratch=LEARNING_RATE_FROM_SCRATCH * batch_size / 32,
    )  # fmt: skip
    check_named_files(plan)
    check_spectrograms(plan.source, n_mels, hop_ms)

    # what cannot be is refused by now; these take seconds to import
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from microtune.callbacks.int8_training import Int8Training
    from microtune.callbacks.sparse_update import SparseUpdate
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.networks import describe_network
    from microtune.recipes.training.pretrained import earlier_classifier, load_pretrained, take_trunk, test_quietly
    from microtune.recipes.training.run import begin_run, finish_run, forget_averages, set_up, trainer_on
    from microtune.recipes.training.schemes import scheme_to_train

    data = words_to_learn(arguments)
    set_up(data)
    earlier_data = earlier_words(plan.source) if forgetting and not run.evaluate_only else None
    described = describe_network(
        plan.source, data.input_shape, data.num_classes, network.width, network.head_convolution
    )
    scheme = scheme_to_train(plan, described)

    seed_everything(seed, verbose=False)
    module = Classifier(
        described.to_evaluate(plan.source) if run.evaluate_only else described.to_train(scheme is not None),
        class_names=data.class_names, input_shape=list(data.input_shape), **plan.hyperparameters,
    )  # fmt: skip
    load_pretrained(module, plan.source, data.input_shape, whole=run.evaluate_only)
    if earlier_data is not None:
        earlier = earlier_classifier(module, plan.source, data.input_shape, earlier_data)
    if devices.compile:
        module.net.compile()

    callbacks = [ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)]
    if scheme is not None:
        callbacks.append(SparseUpdate(
            scheme, "net", budget.method, budget.channel_choice, seed, data.input_shape, budget.rechoose_every,
            budget.choice_samples,
        ))  # fmt: skip
    if plan.trains_int8:
        callbacks.append(Int8Training(int8.weight_storage, int8.gradient_scaling, seed))
    if decay := plan.averaging_decay(data.train_samples):
        callbacks.append(EMAWeightAveraging(decay=decay))
    trainer = trainer_on(
        devices, max_epochs=epochs, callbacks=callbacks, accumulate_grad_batches=optimization.accumulate_batches,
        gradient_clip_val=optimization.gradient_clip_norm,
    )  # fmt: skip
    begun = begin_run("train_mswc", arguments, plan, described, scheme, trainer)
    facts = {}
    if earlier_data is not None:
        facts["earlier_top1_before"] = test_quietly(trainer, earlier, earlier_data)
    if not run.evaluate_only:
        trainer.fit(module, data, ckpt_path=begun.checkpoint)
    forget_averages(trainer)
    if earlier_data is not None:
        take_trunk(earlier, module)
        facts["earlier_top1_after"] = test_quietly(trainer, earlier, earlier_data)
    return finish_run(begun, plan, trainer, module, data, facts)


def words_to_learn(arguments: dict[str, Any]) -> "MSWC":
    """The data module that this recipe's arguments, or the ``config.yaml`` of a run, describe."""
    from microtune.datamodules.mswc import MSWC

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


def earlier_words(weights: str) -> "ClassificationData | None":
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


def commands_learnt(arguments: dict[str, Any]) -> "SpeechCommands":
    """The data module that the ``config.yaml`` of a run of ``train_speech_commands.py`` describes."""
    from microtune.datamodules.speech_commands import SpeechCommands

    same = ("task", "version", "n_mels", "hop_ms", "cache", "skip_broken")
    cache_dir = arguments["cache_dir"] and Path(arguments["cache_dir"])
    return SpeechCommands(arguments["data_dir"], cache_dir=cache_dir, **{name: arguments[name] for name in same})


if __name__ == "__main__":
    run_recipe(main)
