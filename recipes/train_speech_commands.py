"""Trains MobileNetV2 on Google Speech Commands, from scratch or under an update scheme that fits a microcontroller.

    uv run recipes/train_speech_commands.py --data_dir data --download --task words12

From scratch that is 120 epochs: on two cores of an AMD EPYC 167 seconds for the ten commands with 952 training clips,
which give 90 % (3 seeds). The whole data set has many times as many clips, and needs fewer epochs.
"""

from pathlib import Path
from typing import Any, Literal

from microtune.datamodules.option_names import CacheName, Task
from microtune.recipes.training.command_line import flat, run_recipe
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


def main(
    data_dir: Path = Path("data"),
    task: Task = "words12",
    version: Literal[1, 2] = 2,
    download: bool = False,
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
    """Trains MobileNetV2 on Google Speech Commands, from scratch or under an update scheme that fits an MCU.

    Args:
        data_dir: Folder that holds SpeechCommands/speech_commands_v0.02.
        task: Words to tell apart: words10 (the ten commands), words12 (and _unknown_ and _silence_) or all.
        version: Version of the data: 1 or 2.
        download: Whether to fetch the data (2.4 GB) where it is missing.
        n_mels: Number of bands of the log-mel spectrogram.
        hop_ms: Milliseconds between its frames.
        epochs: Number of passes over the training split.
        batch_size: Number of clips per step.
        seed: Seed of the fresh classifier, the order of the clips and their augmentation.
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
    from microtune.datamodules.speech_commands import SpeechCommands
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.networks import describe_network
    from microtune.recipes.training.pretrained import load_pretrained
    from microtune.recipes.training.run import begin_run, finish_run, set_up, trainer_on
    from microtune.recipes.training.schemes import scheme_to_train

    data = SpeechCommands(
        data_dir, task, version, batch_size, seed, n_mels=n_mels, hop_ms=hop_ms, cache=cache, cache_dir=cache_dir,
        download=download, skip_broken=skip_broken, num_workers=num_workers,
    )  # fmt: skip
    set_up(data)
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
    begun = begin_run("train_speech_commands", arguments, plan, described, scheme, trainer)
    if not run.evaluate_only:
        trainer.fit(module, data, ckpt_path=begun.checkpoint)
    return finish_run(begun, plan, trainer, module, data)


if __name__ == "__main__":
    run_recipe(main)
