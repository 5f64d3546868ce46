"""What a process has used of a machine, as it is reported in the messages that are sent anyway. Pure data.

Whole numbers: they add up to the same in every order.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedtide.fabric.strict import Message

MOST = 2**53
"""Of any quantity: JSON readers keep whole numbers up to here. 285 years of a core; 104 days of a terabyte."""
MOST_GPUS = 16
"""Of one machine."""
LARGEST_CPUS, LARGEST_MEMORY = 4096, 2**46
"""Of one machine."""
MOST_CPUS, MOST_MEMORY = 64, 2**38
"""Of a process whose machine is not known."""
FASTEST_LINK = 12_500_000_000
"""Bytes a second."""
Quantity = Annotated[int, Field(ge=0, le=MOST)]


class Usage(Message):
    """Between two reports, or since a process started."""

    cpu_us: Quantity = Field(default=0, description="CPU time of the process and of all that it has started, in µs")
    memory_kb_s: Quantity = Field(default=0, description="Resident memory over time, in kB times seconds")
    gpu_us: Quantity = Field(default=0, description="Time for which it held GPUs, each counted, in µs")
    received_bytes: Quantity = Field(default=0, description="Over its connection to the region's server, or the hub")
    sent_bytes: Quantity = 0

    def __bool__(self) -> bool:
        return self != Usage()

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: min(getattr(self, name) + getattr(other, name), MOST) for name in QUANTITIES})

    def __sub__(self, before: Usage) -> Usage:
        """What came since `before`; nothing where that was more (a counter that began anew)."""
        return Usage(**{name: max(getattr(self, name) - getattr(before, name), 0) for name in QUANTITIES})

    def within(self, most: Usage) -> Usage:
        """As far as it is not more than `most`, each quantity for itself."""
        return Usage(**{name: min(getattr(self, name), getattr(most, name)) for name in QUANTITIES})

    def at_most(self, seconds: float, cpus: int, memory_bytes: int) -> Usage:
        """As far as a machine of that size can have used it in that time."""
        return self.within(possible(seconds, cpus, memory_bytes))


def possible(seconds: float, cpus: int, memory_bytes: int) -> Usage:
    """All that a machine can use in a time; of what it says of its size no more is believed than there is."""
    cpus, memory_bytes = min(cpus, LARGEST_CPUS), min(memory_bytes, LARGEST_MEMORY)
    return Usage(
        cpu_us=min(round(1e6 * seconds * cpus), MOST),
        memory_kb_s=min(round(seconds * memory_bytes / 1000), MOST),
        gpu_us=min(round(1e6 * seconds * MOST_GPUS), MOST),
        received_bytes=min(round(seconds * FASTEST_LINK), MOST),
        sent_bytes=min(round(seconds * FASTEST_LINK), MOST),
    )


QUANTITIES = ("cpu_us", "memory_kb_s", "gpu_us", "received_bytes", "sent_bytes")
