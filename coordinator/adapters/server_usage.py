"""What the hub's servers use: they tell it themselves every few seconds, on their own account.

CPU is an estimate: a server tells its share of the second before (nats-server, `server/pse`), and that is taken for
all the time since it told the last one. Leaves tell nobody: a region could tell anything about the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from pydantic import Field

from fedtide.fabric.encoding import from_json
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.permissions import SERVER_STATISTICS
from fedtide.fabric.strict import Message

LONGEST_S = 120.0
"""Between two of them; of a longer time nothing is known."""


class _Server(Message):
    id: str


class _Moved(Message):
    bytes: int = Field(default=0, ge=0)


class _Statistics(Message):
    mem: int = Field(default=0, ge=0, description="Resident bytes")
    cpu: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Percent of one core")
    cores: int = Field(default=1, ge=1)
    sent: _Moved = _Moved()
    received: _Moved = _Moved()


class _Told(Message):
    server: _Server
    statsz: _Statistics


class _Seen(NamedTuple):
    at: float
    received: int
    sent: int


class ServerUsage:
    """Adds up what the servers of the hub tell."""

    def __init__(self, heard: Callable[[Usage], None], clock: Callable[[], float] = monotonic) -> None:
        self._heard = heard
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    async def listen(self, system: Broker) -> None:
        await system.subscribe(SERVER_STATISTICS, self.on_statistics)

    async def on_statistics(self, message: Received) -> None:
        """Raises MalformedMessage if they are none."""
        told = from_json(_Told, message.data, "a server's statistics")
        now = _Seen(self._clock(), told.statsz.received.bytes, told.statsz.sent.bytes)
        before = self._seen.pop(told.server.id, None)
        self._seen = {name: seen for name, seen in self._seen.items() if now.at - seen.at < LONGEST_S}
        self._seen[told.server.id] = now
        if before is None or now.at - before.at > LONGEST_S:
            return
        seconds, about = now.at - before.at, told.statsz
        self._heard(
            Usage(
                cpu_us=round(1e4 * seconds * min(about.cpu, 100.0 * about.cores)),
                memory_kb_s=round(seconds * about.mem / 1000),
                received_bytes=max(now.received - before.received, 0),
                sent_bytes=max(now.sent - before.sent, 0),
            )
        )
