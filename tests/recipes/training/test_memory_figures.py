"""Memory of a training that chooses channels anew: what it needs, and that it is refused where only a step fits."""

import pytest

from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import dynamic_choice
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.memory_figures import memory_figures, refuse_oversize, scheme_fits


@pytest.fixture
def scheme(scheme_file):
    return UpdateScheme.load(scheme_file)


def test_memory_of_a_dynamic_run(scheme, described):
    peak_memory = PeakMemory(described.operations)
    figures = memory_figures(peak_memory, scheme, microcontroller("stm32f746"), "taylor")
    choice = dynamic_choice(described.operations, scheme, "taylor")
    assert figures["peak_memory_bytes"] == peak_memory.peak_bytes(scheme)
    assert figures["rechoosing_peak_memory_bytes"] == peak_memory.peak_bytes(scheme) + choice.score_bytes
    assert figures["sram_margin_bytes"] == figures["budget_bytes"] - figures["rechoosing_peak_memory_bytes"]
    assert figures["flash_bytes"] == choice.flash_bytes
    assert figures["fits"]


@pytest.mark.parametrize(
    ("choice", "lacking"),
    [
        ("taylor", "sram"),
        ("loss_decrease", "sram"),
        ("random", "flash"),
        ("weight_norm", "flash"),
    ],
)
def test_dynamic_run_that_does_not_fit_although_a_step_does(choice, lacking, scheme, described):
    peak_memory, score_bytes = PeakMemory(described.operations), 4 * (56 + 56)
    peak_bytes = peak_memory.peak_bytes(scheme)
    if choice == "loss_decrease":
        peak_bytes = PeakMemory(described.operations, gradient_accumulation=True).peak_bytes(scheme)
    whole_bytes = dynamic_choice(described.operations, scheme, choice).flash_bytes
    enough = {"sram": (peak_bytes + score_bytes, None), "flash": (10**6, whole_bytes)}[lacking]
    less = {"sram": (enough[0] - 1, None), "flash": (10**6, whole_bytes - 1)}[lacking]

    def fits(sram_bytes, flash_bytes, rechosen_by):
        account = (peak_memory, scheme, microcontroller(None, sram_bytes, flash_bytes, 0), rechosen_by)
        assert memory_figures(*account)["fits"] is scheme_fits(*account)
        return scheme_fits(*account)

    assert fits(*enough, choice)
    assert fits(*less, None)
    assert not fits(*less, choice)
    message = rf"one training step fits custom, but choosing channels anew by {choice} needs [\d.]+ KiB "
    message += {"sram": "at its peak, but there are", "flash": "of flash for what leaves, but there are"}[lacking]
    message += r" [\d.]+ KiB: choose once, or update fewer .*--allow_oversize"
    device = microcontroller(None, *less, 0)
    with pytest.raises(UserError, match=message):
        refuse_oversize(peak_memory, scheme, device, described.network, "or --allow_oversize", choice)
    refuse_oversize(peak_memory, scheme, microcontroller(None, *enough, 0), described.network, "", choice)
    refuse_oversize(peak_memory, scheme, device, described.network, "", None)
