"""Channels that a recipe chooses by data, and anew in training: what the run keeps and reports, and that it resumes.

That every criterion chooses what it says is in tests/callbacks/test_channel_choosing.py.
"""

import math

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("choice", ["random", "loss_decrease"])
def test_channels_are_chosen_anew(choice, scheme_file, train, checkpoint_of, tmp_path):
    """Without data and by data."""
    options = {"scheme": str(scheme_file), "channel_choice": choice, "choice_samples": 16, "allow_oversize": True}
    report = train("train_cifar", **options, rechoose_every=2, learning_rate=0.05)
    (state,) = (state for key, state in checkpoint_of(tmp_path / "run")["callbacks"].items() if "SparseUpd" in key)
    assert state["channel_choice"] == report["channel_choice"] == choice
    assert state["rechoose_every"] == report["rechoose_every"] == 2
    assert state["chosen_at_step"] == 4  # of 6 steps
    assert {name: len(channels) for name, channels in state["channels"].items() if len(channels) < 16} == {
        "features.15.conv.0.0": 7,
    }
    assert "rechoosing_peak_memory_bytes" in report  # how many is in test_memory_figures.py
    assert math.isfinite(report["loss"])


def test_choice_by_data_of_keywords(two_steps, train):
    """Whose spectrograms are made between the loader and the training step."""
    report = train("train_speech_commands", scheme="sub_tensor", channel_choice="taylor", choice_samples=8)
    assert report["channel_choice"] == "taylor"
    assert not {"rechoose_every", "rechoosing_peak_memory_bytes"} & report.keys()


def test_report_says_nothing_of_the_usual_choice(finished_runs, report_of):
    assert not {"channel_choice", "rechoose_every", "rechoosing_peak_memory_bytes"} & set(
        report_of(finished_runs["train_cifar"])
    )


def test_dynamic_run_is_resumed(train, interrupt, weights_of, tmp_path):
    options = {"scheme": "sub_tensor", "channel_choice": "fisher", "rechoose_every": 4, "choice_samples": 16}
    options |= {"momentum": 0.9, "epochs": 2, "learning_rate": 0.05}
    whole = train("train_cifar", **options, out_dir=tmp_path / "whole")
    interrupt(epoch=1)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        train("train_cifar", **options)
    resumed = train("train_cifar", **options, resume=True)
    torch.testing.assert_close(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"), rtol=0, atol=0)
    assert whole | {"seconds": 0} == resumed | {"seconds": 0}
