"""Fine-tunes MobileNetV2 on CIFAR-10 or CIFAR-100 under an update scheme that fits a microcontroller.

    uv run recipes/train_cifar.py --data_dir data --download --weights KERAS_FILE.h5 \\
        --scheme sub_tensor --learning_rate 0.006

On two cores of an AMD EPYC ten epochs of 5,850 images at 96 px take 71 seconds; from Keras' weights of width 0.35 they
give 84.2 % (3 seeds) with 215 KiB at the peak, where full update gives 83.1 % with 1,016 KiB.
"""

from pathlib import Path
from typing import Any, Literal

from microtune.datamodules.option_names import AugmentationName
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


def main(
    data_dir: Path = Path("data"),
    classes: Literal[10, 100] = 10,
    download: bool = False,
    resolution: int = 96,
    augmentation: AugmentationName = "shift",
    validation_fraction: float = 0.1,
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 0,
    network: NetworkOptions = NetworkOptions(),
    budget: BudgetOptions = BudgetOptions(),
    optimization: OptimizationOptions = OptimizationOptions(),
    int8: Int8Options = Int8Options(),
    devices: DeviceOptions = DeviceOptions(),
    run: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Fine-tunes MobileNetV2 on CIFAR-10 or CIFAR-100 under an update scheme that fits a microcontroller.

    Args:
        data_dir: Folder that holds cifar-10-batches-py or cifar-100-python.
        classes: Number of classes: 10 or 100.
        download: Whether to fetch the data where it is missing.
        resolution: Height and width of the input in pixels; the 32 px images are enlarged.
        augmentation: Augmentation of the training images: shift (moved and mirrored), crop (a random part of 8 to 100 %
            of the area, mirrored, other colours; what is tested is the middle 87.5 %, as in the paper's code) or none.
        validation_fraction: Part of the training images that is held out for validation; 0 for none.
        epochs: Number of passes over the training split.
        batch_size: Number of samples per step.
        seed: Seed of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Number of processes that load the data.
    """
    arguments = flat(locals())
    plan = plan_training(
        network, budget, optimization, int8, devices, run,
        epochs=epochs, batch_size=batch_size, seed=seed, num_workers=num_workers,
    )  # fmt: skip
    check_named_files(plan)

    # what cannot be is refused by now; these take seconds to import
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from microtune.callbacks.int8_training import Int8Training
    from microtune.callbacks.sparse_update import SparseUpdate
    from microtune.datamodules.cifar import CIFAR
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.networks import describe_network, normalization_of
    from microtune.recipes.training.pretrained import load_pretrained
    from microtune.recipes.training.run import begin_run, finish_run, set_up, trainer_on
    from microtune.recipes.training.schemes import scheme_to_train

    data = CIFAR(
        data_dir, classes, resolution, batch_size, seed, augmentation, normalization=normalization_of(plan.source),
        download=download, num_workers=num_workers, validation_fraction=validation_fraction,
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
    begun = begin_run("train_cifar", arguments, plan, described, scheme, trainer)
    if not run.evaluate_only:
        trainer.fit(module, data, ckpt_path=begun.checkpoint)
    return finish_run(begun, plan, trainer, module, data)


if __name__ == "__main__":
    run_recipe(main)
