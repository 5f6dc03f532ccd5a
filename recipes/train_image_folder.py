"""Fine-tunes MobileNetV2 on any folder of image classes under an update scheme that fits a microcontroller.

    uv run recipes/train_image_folder.py --data_dir flowers --weights KERAS_FILE.h5 --scheme sub_tensor \\
        --learning_rate 0.006 --epochs 5

On Flowers-17 (918 training images, 96 px, Keras' weights of width 0.35) that takes about half a minute on one core of
an AMD EPYC and gives 86 % (one seed).
"""

from pathlib import Path
from typing import Any

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
    data_dir: Path,
    resolution: int = 96,
    epochs: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 2,
    skip_broken: bool = False,
    network: NetworkOptions = NetworkOptions(),
    budget: BudgetOptions = BudgetOptions(),
    optimization: OptimizationOptions = OptimizationOptions(),
    int8: Int8Options = Int8Options(),
    devices: DeviceOptions = DeviceOptions(),
    run: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Fine-tunes MobileNetV2 on any folder of image classes under an update scheme that fits a microcontroller.

    Args:
        data_dir: Folder that holds a folder per class with its images; or train/ and test/ (or val/) with a folder per
            class in each.
        resolution: Height and width of the input in pixels.
        epochs: Number of passes over the training split.
        batch_size: Number of samples per step.
        seed: Seed of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Number of processes that load the data.
        skip_broken: Whether to leave out files that are no images, and say how many.
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
    from microtune.datamodules.image_folder import ImageFolder
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.networks import describe_network, normalization_of
    from microtune.recipes.training.pretrained import load_pretrained
    from microtune.recipes.training.run import begin_run, finish_run, set_up, trainer_on
    from microtune.recipes.training.schemes import scheme_to_train

    data = ImageFolder(
        data_dir, resolution, batch_size, seed, normalization=normalization_of(plan.source), num_workers=num_workers,
        skip_broken=skip_broken,
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
    begun = begin_run("train_image_folder", arguments, plan, described, scheme, trainer)
    if not run.evaluate_only:
        trainer.fit(module, data, ckpt_path=begun.checkpoint)
    return finish_run(begun, plan, trainer, module, data)


if __name__ == "__main__":
    run_recipe(main)
