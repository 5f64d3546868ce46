"""What a worker of a region has used, told as nodes do: totals, now and then, of which some may be lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import TransientError
from fedtide.fabric.ids import new_id
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.process.metering import Meter

TELL_EVERY_S = 30.0


class WorkerMeter:
    """One for the life of the process. What is `taken` for a request is not told a second time."""

    def __init__(self) -> None:
        self._meter, self._boot, self._began = Meter("both"), new_id("boot"), time.monotonic()
        self._broker: Broker | None = None
        self._moved, self._rest = (0, 0), Usage()

    def take(self) -> Usage:
        """What was used since the last call."""
        traffic = self._broker.traffic if self._broker is not None else (0, 0)
        received, sent = (max(now - before, 0) for now, before in zip(traffic, self._moved, strict=True))
        self._moved = traffic
        return Usage(**self._meter.mark()._asdict(), received_bytes=received, sent_bytes=sent)

    def leave(self) -> None:
        """What was used since the last call was for no request."""
        self._rest += self.take()

    @asynccontextmanager
    async def telling(self, broker: Broker, subject: str) -> AsyncIterator[None]:
        """Tell what was for no request, on a subject of telemetry, as long as this is entered."""
        self._broker, self._moved = broker, (0, 0)
        telling = asyncio.create_task(self._tell(broker, subject), name="usage")
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _tell(self, broker: Broker, subject: str) -> None:
        while True:
            self.leave()
            beat = Heartbeat(
                used=self._rest,
                boot=self._boot,
                uptime_s=time.monotonic() - self._began,
                heartbeat_s=TELL_EVERY_S,
            )
            with suppress(TransientError):  # the next one tells it, too
                await broker.tell(subject, to_json(beat))
            await asyncio.sleep(TELL_EVERY_S)
