"""The scheme of a recipe: as much as fits, and room for scores where channels are chosen anew."""

import pytest

from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.memory_figures import memory_figures
from microtune.recipes.training.schemes import scheme_by_name_or_file


def test_scheme_that_fills_leaves_room_for_scores(described):
    peak_memory, device = PeakMemory(described.operations), microcontroller(None, 150_000, None, 0)
    scheme = scheme_by_name_or_file("sub_tensor", described, peak_memory, device, "loss_decrease")
    figures = memory_figures(peak_memory, scheme, device, "loss_decrease")
    assert figures["fits"]
    assert figures["peak_memory_bytes"] < figures["rechoosing_peak_memory_bytes"] <= 150_000


def test_choice_that_a_file_leaves_nothing_for_is_refused_before_the_run(train, tmp_path):
    """What names of schemes say is in test_plan.py."""
    UpdateScheme("mobilenet_v2-w0.35", 3).save(tmp_path / "biases.json")
    with pytest.raises(UserError, match=r"^rechoose_every is 3, but there is nothing to choose: "):
        train("train_cifar", scheme=str(tmp_path / "biases.json"), rechoose_every=3)
    assert not (tmp_path / "run").exists()


def test_choice_that_does_not_fit_is_refused_before_the_run(described, scheme_file, train, tmp_path):
    """What is lacking, and by how much, is in test_memory_figures.py."""
    sram_bytes = PeakMemory(described.operations).peak_bytes(UpdateScheme.load(scheme_file))
    options = {"scheme": str(scheme_file), "sram_bytes": sram_bytes, "reserve_bytes": 0}
    message = "fits custom, but choosing channels anew by taylor needs .*: choose once, .*--allow_oversize"
    with pytest.raises(UserError, match=message):
        train("train_cifar", **options, channel_choice="taylor", rechoose_every=100)
    assert not (tmp_path / "run").exists()
