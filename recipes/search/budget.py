"""What a scheme may take: a budget of one kind of memory, often a microcontroller's."""

from dataclasses import dataclass
from typing import Any

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS, Microcontroller, microcontroller
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.user_error import UserError
from microtune.recipes.training.memory_figures import KIB


@dataclass(frozen=True)
class Budget:
    """What a scheme may take.

    Args:
        memory: Kind of memory: the peak of a training step, or the paper's extra memory.
        size_bytes: Limit in bytes.
        microcontroller: Device whose limit it is; none of extra memory, which leaves out the forward pass.
    """

    memory: Memory
    size_bytes: int
    microcontroller: Microcontroller | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For a report."""
        mcu = None if self.microcontroller is None else self.microcontroller.name
        return {"memory": self.memory, "budget_bytes": self.size_bytes, "mcu": mcu}

    def __str__(self) -> str:
        whose = f" of {self.microcontroller.name}" if self.microcontroller else ""
        return f"{self.size_bytes / KIB:.1f} KiB of {self.memory} memory{whose}"


def budget_of(
    memory: Memory, budget_kib: float | None, mcu: str | None, sram_bytes: int | None, flash_bytes: int | None,
    reserve_bytes: int | None,
) -> Budget:  # fmt: skip
    """The budget that the command line describes: an MCU by the peak, or kibibytes of either memory.

    Args:
        memory, budget_kib, mcu, sram_bytes, flash_bytes, reserve_bytes: As in ``SearchBudgetOptions``.

    Raises:
        UserError: There are two budgets, or none, or the microcontroller is unknown.

    Example::

        str(budget_of("extra", 64, None, None, None, None))  # "64.0 KiB of extra memory"
    """
    described = mcu is not None or any(size is not None for size in (sram_bytes, flash_bytes, reserve_bytes))
    if budget_kib is not None:
        if not 0 < budget_kib < 1e9:
            raise UserError(f"budget_kib is {budget_kib}: give a positive number of kibibytes")
        if described:
            raise UserError("a microcontroller and budget_kib are two budgets: give one of them")
        return Budget(memory, round(budget_kib * KIB))
    if memory == "extra":
        raise UserError(
            "extra memory leaves out the forward pass, so that no microcontroller is its limit: give --budget_kib, "
            "or --memory peak"
        )
    default = "stm32f746" if sram_bytes is None else None
    device = microcontroller(mcu or default, sram_bytes, flash_bytes, reserve_bytes)
    return Budget("peak", device.budget_bytes, device)


def all_budgets() -> list[Budget]:
    """The peak budgets of all known microcontrollers, the smallest first."""
    devices = sorted(MICROCONTROLLERS.values(), key=lambda device: device.budget_bytes)
    return [Budget("peak", device.budget_bytes, device) for device in devices]
