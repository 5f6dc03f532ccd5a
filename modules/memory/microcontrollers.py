"""Microcontrollers by name: what one buffer can use of their SRAM, and their flash."""

import difflib
from dataclasses import dataclass, replace

from microtune.modules.user_error import UserError

KIB, MIB = 1024, 1024 * 1024
# Both reserves are this project's choice: stack, im2col buffers and runtime, and more where a radio stack shares SRAM.
RESERVE_BYTES = 32 * KIB
RADIO_RESERVE_BYTES = 64 * KIB


@dataclass(frozen=True)
class Microcontroller:
    """A device as the memory budget sees it.

    Args:
        name: Its name in the table, or any other.
        sram_bytes: What one buffer can use: the longest contiguous range of addresses, not the sum of all regions.
        flash_bytes: Where the frozen weights stay; None where flash is not to be checked.
        reserve_bytes: SRAM that is not for training: stack, im2col buffers, runtime, a radio's stack.
        source: Where the numbers come from.

    Raises:
        UserError: A size is not positive, or the reserve is negative or takes the whole SRAM.

    Example::

        Microcontroller("mine", sram_bytes=262144, flash_bytes=None, reserve_bytes=32768, source="board manual")
    """

    name: str
    sram_bytes: int
    flash_bytes: int | None
    reserve_bytes: int
    source: str

    def __post_init__(self):
        if self.sram_bytes <= 0:
            raise UserError(f"sram_bytes of {self.name} is {self.sram_bytes}: give a positive number of bytes")
        if self.flash_bytes is not None and self.flash_bytes <= 0:
            raise UserError(f"flash_bytes of {self.name} is {self.flash_bytes}: give a positive number of bytes")
        if self.reserve_bytes < 0:
            raise UserError(f"reserve_bytes of {self.name} is {self.reserve_bytes}: give 0 or more")
        if self.reserve_bytes >= self.sram_bytes:
            raise UserError(
                f"reserve_bytes of {self.name} is {self.reserve_bytes}, but its SRAM has {self.sram_bytes} bytes: "
                "nothing would be left for training; give a smaller reserve"
            )

    @property
    def budget_bytes(self) -> int:
        """What the peak of a training step may take."""
        return self.sram_bytes - self.reserve_bytes


@dataclass(frozen=True)
class Fit:
    """Whether one training step fits a microcontroller.

    Args:
        microcontroller: The device.
        peak_bytes: Highest number of bytes alive in the step, as ``PeakMemory`` gives it.
        flash_bytes: Bytes that stay in flash, as ``flash_bytes`` gives them.

    Example::

        Fit(microcontroller("stm32f746"), peak_bytes=200_000, flash_bytes=300_000).fits  # True
    """

    microcontroller: Microcontroller
    peak_bytes: int
    flash_bytes: int

    @property
    def sram_margin_bytes(self) -> int:
        """What is left of the budget; negative where the peak exceeds it."""
        return self.microcontroller.budget_bytes - self.peak_bytes

    @property
    def flash_margin_bytes(self) -> int | None:
        """What is left of the flash; None where it is not checked."""
        available = self.microcontroller.flash_bytes
        return None if available is None else available - self.flash_bytes

    @property
    def fits(self) -> bool:
        """Whether neither margin is negative."""
        return self.sram_margin_bytes >= 0 and (self.flash_margin_bytes is None or self.flash_margin_bytes >= 0)


_TABLE = (
    Microcontroller(
        "stm32f746",
        320 * KIB,
        1 * MIB,
        RESERVE_BYTES,
        "ST DS10916 (STM32F746xG): DTCM 64 + SRAM1 240 + SRAM2 16 KiB, contiguous from 0x20000000",
    ),
    Microcontroller(
        "stm32h743",
        512 * KIB,
        2 * MIB,
        RESERVE_BYTES,
        "ST DS12110 (STM32H743xI): the AXI SRAM at 0x24000000; the other regions lie in other domains",
    ),
    Microcontroller("stm32f411", 128 * KIB, 512 * KIB, RESERVE_BYTES, "ST DS10314 (STM32F411xE): SRAM1"),
    Microcontroller(
        "stm32f407",
        128 * KIB,
        1 * MIB,
        RESERVE_BYTES,
        "ST DS8626 (STM32F407xG): SRAM1 112 + SRAM2 16 KiB, contiguous; the 64 KiB of CCM lie apart",
    ),
    Microcontroller("stm32f412", 256 * KIB, 1 * MIB, RESERVE_BYTES, "ST DS11139 (STM32F412xG): SRAM1"),
    Microcontroller(
        "stm32f765",
        512 * KIB,
        2 * MIB,
        RESERVE_BYTES,
        "ST DS11532 (STM32F765xI): DTCM 128 + SRAM1 368 + SRAM2 16 KiB, contiguous from 0x20000000",
    ),
    Microcontroller(
        "nrf52840",
        256 * KIB,
        1 * MIB,
        RADIO_RESERVE_BYTES,
        "Nordic nRF52840 Product Specification, Memory: data RAM from 0x20000000; its radio stack shares it",
    ),
    Microcontroller(
        "rp2040",
        264 * KIB,
        2 * MIB,
        RESERVE_BYTES,
        "RP2040 datasheet, SRAM: 0x20000000 to 0x20041FFF; flash external, as on the Raspberry Pi Pico",
    ),
    Microcontroller(
        "rp2350",
        520 * KIB,
        4 * MIB,
        RESERVE_BYTES,
        "RP2350 datasheet, SRAM: 0x20000000 to 0x20081FFF; flash external, as on the Raspberry Pi Pico 2",
    ),
    Microcontroller(
        "esp32s3",
        416 * KIB,
        8 * MIB,
        RADIO_RESERVE_BYTES,
        "ESP32-S3 Technical Reference Manual, System and Memory: SRAM1 on the data bus (SRAM2 is partly cache), which "
        "its radio stack shares; flash external, as on the WROOM-1-N8",
    ),
    Microcontroller(
        "imxrt1062",
        512 * KIB,
        8 * MIB,
        RESERVE_BYTES,
        "NXP IMXRT1060 Reference Manual: OCRAM2 at 0x20200000 (FlexRAM's 512 KiB are divided among ITCM, DTCM and "
        "OCRAM); flash external, as on the Teensy 4.1 and the EVKB",
    ),
)
MICROCONTROLLERS = {device.name: device for device in _TABLE}


def microcontroller(
    name: str | None = None,
    sram_bytes: int | None = None,
    flash_bytes: int | None = None,
    reserve_bytes: int | None = None,
) -> Microcontroller:
    """A microcontroller of the table, or one described by its sizes.

    Args:
        name: One of ``MICROCONTROLLERS``.
        sram_bytes: Replaces the named one's; required without a name.
        flash_bytes: Replaces the named one's; without a name and without it, flash is not checked.
        reserve_bytes: Replaces the named one's; without a name the default is 32 KiB.

    Raises:
        UserError: The name is unknown, neither a name nor ``sram_bytes`` is given, or a size is out of its range.

    Example::

        microcontroller("stm32f746").budget_bytes  # 294912: 320 KiB less a reserve of 32 KiB
        microcontroller(sram_bytes=256 * 1024, reserve_bytes=16 * 1024)
    """
    given = {"sram_bytes": sram_bytes, "flash_bytes": flash_bytes, "reserve_bytes": reserve_bytes}
    given = {field: value for field, value in given.items() if value is not None}
    if name is None:
        if sram_bytes is None:
            raise UserError(f"no microcontroller: give sram_bytes or one of the names {', '.join(MICROCONTROLLERS)}")
        described = {"flash_bytes": None, "reserve_bytes": RESERVE_BYTES, **given}
        return Microcontroller(name="custom", source="given by the user", **described)
    if name not in MICROCONTROLLERS:
        nearest = difflib.get_close_matches(name.lower(), MICROCONTROLLERS, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise UserError(
            f"unknown microcontroller {name!r}{hint}: known are {', '.join(MICROCONTROLLERS)}; "
            "describe any other by sram_bytes"
        )
    device = MICROCONTROLLERS[name]
    if not given:
        return device
    return replace(device, source=f"{device.source}; {', '.join(given)} given by the user", **given)
