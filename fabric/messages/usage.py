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

    def at_most(self, seconds: float, cpus: int, memory_bytes: int) -> Usage:
        """As far as a machine of that size can have used it in that time."""
        return Usage(
            cpu_us=min(self.cpu_us, round(1e6 * seconds * cpus)),
            memory_kb_s=min(self.memory_kb_s, round(seconds * memory_bytes / 1000)),
            gpu_us=min(self.gpu_us, round(1e6 * seconds * MOST_GPUS)),
            received_bytes=min(self.received_bytes, round(seconds * FASTEST_LINK)),
            sent_bytes=min(self.sent_bytes, round(seconds * FASTEST_LINK)),
        )


QUANTITIES = ("cpu_us", "memory_kb_s", "gpu_us", "received_bytes", "sent_bytes")
