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
    data_dir: Path = Path("data/imagenet"),
    resolution: int = 224,
    epochs: int = 150,
    batch_size: int = 256,
    seed: int = 0,
    num_workers: int = 2,
    smallest_crop: float = 0.08,
    skip_broken: bool = False,
    network: NetworkOptions = NetworkOptions(),
    budget: BudgetOptions = BudgetOptions(),
    optimization: OptimizationOptions = OptimizationOptions(),
    int8: Int8Options = Int8Options(),
    devices: DeviceOptions = DeviceOptions(),
    run: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Trains MobileNetV2 on ImageNet from scratch, fine-tunes it under an update scheme, or tests weights.

    Args:
        data_dir: Folder that holds train/ and val/ with a folder per wnid in each, or the original archives.
        resolution: Height and width of the input in pixels.
        epochs: Number of passes over the training split.
        batch_size: Number of samples per step and device.
        seed: Seed of the fresh classifier, the order of the samples and their augmentation.
        num_workers: Number of processes that load the data.
        smallest_crop: Smallest part of a training image that is shown, as a fraction of its area; small networks do
            better with 0.25.
        skip_broken: Whether to leave out files that are no images, and say how many; decodes every file once.
    """
    arguments = flat(locals())
    plan = plan_training(
        network, budget, optimization, int8, devices, run,
        epochs=epochs, batch_size=batch_size, seed=seed, num_workers=num_workers,
        ema_decay_from_scratch=0.9999,
    )  # fmt: skip
    check_named_files(plan)

    # what cannot be is refused by now; these take seconds to import
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from microtune.callbacks.int8_training import Int8Training
    from microtune.callbacks.sparse_update import SparseUpdate
    from microtune.datamodules.imagenet import ImageNet
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.networks import describe_network, normalization_of
    from microtune.recipes.training.pretrained import load_pretrained
    from microtune.recipes.training.run import begin_run, finish_run, set_up, trainer_on
    from microtune.recipes.training.schemes import scheme_to_train

    data = ImageNet(
        data_dir, resolution, batch_size, seed, smallest_crop=smallest_crop,
        normalization=normalization_of(plan.source), num_workers=num_workers, skip_broken=skip_broken,
        evaluate_only=run.evaluate_only,
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
    begun = begin_run("train_imagenet", arguments, plan, described, scheme, trainer)
    if not run.evaluate_only:
        trainer.fit(module, data, ckpt_path=begun.checkpoint)
    return finish_run(begun, plan, trainer, module, data)


if __name__ == "__main__":
    run_recipe(main)
