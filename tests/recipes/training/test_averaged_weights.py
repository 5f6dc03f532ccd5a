"""Averaged weights: what is tested and kept, resumed to the bit, and frozen where the scheme says so."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from microtune.datamodules.cifar import CIFAR
from microtune.modules.classifier import Classifier
from microtune.modules.networks.pretrained_weights import NORMALIZATION

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_imagenet_from_scratch_has_averaged_weights(monkeypatch, train, checkpoint_of, tmp_path):
    """By the decay of the plan, of which test_plan.py has the others."""
    made = []
    original = EMAWeightAveraging.__init__
    monkeypatch.setattr(
        EMAWeightAveraging, "__init__", lambda average, decay: made.append(decay) or original(average, decay=decay)
    )
    train("train_imagenet", batch_size=11)  # without a last batch of one, which batch norm refuses
    assert made == [3 / 13]
    assert "averaging_state" in checkpoint_of(tmp_path / "run")


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_checkpoint_and_report_are_about_averaged_weights(
    scheme, tiny_cifar, monkeypatch, train, evaluated, checkpoint_of, tmp_path
):
    """The average is reckoned here from the weights after every step, by its definition."""
    after_steps = []

    def keep(module, *_):
        after_steps.append({f"net.{name}": value.clone() for name, value in module.net.state_dict().items()})

    monkeypatch.setattr(Classifier, "on_train_batch_end", keep)
    report = train("train_cifar", scheme=scheme, ema_decay=0.5, learning_rate=0.2, allow_oversize=True)
    assert len(after_steps) == 6
    checkpoint = checkpoint_of(tmp_path / "run")
    kept, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    differing = 0
    assert kept.keys() == after_steps[0].keys()
    for name in kept:
        if name.endswith("num_batches_tracked"):
            continue
        average = after_steps[0][name]
        for step in after_steps[1:]:
            average = 0.5 * average + 0.5 * step[name]
        torch.testing.assert_close(kept[name], average, msg=name)
        differing += not torch.equal(kept[name], current[name])
    assert differing >= 2

    module = Classifier.load_from_checkpoint(tmp_path / "run/last.ckpt")
    data = CIFAR(tiny_cifar, resolution=32, normalization=NORMALIZATION["symmetric"])
    assert (report["top1"], report["loss"]) == pytest.approx(evaluated(module, data), rel=1e-4)


@pytest.mark.parametrize("scheme", ["none", "sub_tensor"])
def test_averaged_weights_are_resumed(scheme, two_steps, train, interrupt, checkpoint_of, tmp_path):
    options = {"scheme": scheme, "ema_decay": 0.9, "epochs": 2, "learning_rate": 0.05}
    whole = train("train_cifar", **options, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train("train_cifar", **options)
    resumed = train("train_cifar", **options, resume=True)
    one, other = (checkpoint_of(tmp_path / name) for name in ("whole", "run"))
    for weights in ("state_dict", "current_model_state"):
        torch.testing.assert_close(one[weights], other[weights], rtol=0, atol=0)
    assert whole | {"seconds": 0} == resumed | {"seconds": 0}


def test_frozen_entries_stay_as_they_were_under_averaging(folded, finished_runs, train, weights_of, tmp_path):
    train("train_cifar", weights=folded, scheme="classifier", ema_decay=0.5, learning_rate=0.1)
    before, after = weights_of(finished_runs["train_cifar"]), weights_of(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"net.classifier.1.weight", "net.classifier.1.bias"}
