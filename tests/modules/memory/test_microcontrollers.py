"""The table of microcontrollers, budgets, and what a description must have."""

import pytest

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS, Fit, Microcontroller, microcontroller
from microtune.modules.user_error import UserError


def test_table_is_complete_and_plausible():
    assert len(MICROCONTROLLERS) == 11
    for name, device in MICROCONTROLLERS.items():
        assert device.name == name
        assert 128 * 1024 <= device.sram_bytes <= 520 * 1024
        assert device.flash_bytes >= 512 * 1024
        assert device.reserve_bytes == (64 if name in ("nrf52840", "esp32s3") else 32) * 1024
        assert device.source
        assert ("external" in device.source) == (name in ("rp2040", "rp2350", "esp32s3", "imxrt1062"))


def test_named_one_with_its_budget():
    device = microcontroller("stm32f746")
    assert (device.sram_bytes, device.flash_bytes) == (320 * 1024, 1024 * 1024)
    assert device.budget_bytes == 288 * 1024


def test_named_one_with_other_values():
    device = microcontroller("stm32f746", sram_bytes=240 * 1024, reserve_bytes=0)
    assert device.budget_bytes == 240 * 1024
    assert device.flash_bytes == 1024 * 1024
    assert device.source.endswith("; sram_bytes, reserve_bytes given by the user")


def test_described_one():
    device = microcontroller(sram_bytes=100_000)
    assert device == Microcontroller("custom", 100_000, None, 32 * 1024, "given by the user")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "stm32f764"},
            r"unknown microcontroller 'stm32f764' \(did you mean stm32f76?5?4?6?\?\): known are stm32f",
        ),
        ({"name": "STM32F746"}, r"did you mean stm32f746\?"),
        ({"name": "toaster"}, r"unknown microcontroller 'toaster': known are .*imxrt1062; describe any other"),
        ({}, r"no microcontroller: give sram_bytes or one of the names stm32f746, "),
        ({"reserve_bytes": 0}, r"no microcontroller: give sram_bytes"),
        (
            {"name": "stm32f411", "reserve_bytes": 131072},
            r"reserve_bytes of stm32f411 is 131072, but its SRAM has 131072",
        ),
        (
            {"sram_bytes": 30_000},
            r"reserve_bytes of custom is 32768, but its SRAM has 30000 bytes: nothing would be left",
        ),
        ({"sram_bytes": -1}, r"sram_bytes of custom is -1: give a positive number"),
        ({"sram_bytes": 0}, r"sram_bytes of custom is 0: give a positive number"),
        ({"name": "rp2040", "flash_bytes": -5}, r"flash_bytes of rp2040 is -5: give a positive number"),
        ({"name": "rp2040", "reserve_bytes": -5}, r"reserve_bytes of rp2040 is -5: give 0 or more"),
    ],
)
def test_wrong_descriptions_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        microcontroller(**arguments)


def test_fit_needs_both_memories():
    device = microcontroller(sram_bytes=100_000, flash_bytes=5_000, reserve_bytes=10_000)
    exact = Fit(device, peak_bytes=90_000, flash_bytes=5_000)
    assert (exact.fits, exact.sram_margin_bytes, exact.flash_margin_bytes) == (True, 0, 0)
    too_high = Fit(device, peak_bytes=90_001, flash_bytes=5_000)
    assert (too_high.fits, too_high.sram_margin_bytes) == (False, -1)
    too_large = Fit(device, peak_bytes=0, flash_bytes=5_001)
    assert (too_large.fits, too_large.flash_margin_bytes) == (False, -1)
    unchecked = Fit(microcontroller(sram_bytes=100_000), peak_bytes=0, flash_bytes=10**9)
    assert (unchecked.fits, unchecked.flash_margin_bytes) == (True, None)
