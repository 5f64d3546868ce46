"""What no event tells: agents between tasks, this process, stores. Added up from heartbeats, and logged now and then.

Heartbeats tell totals since the agent started, so one that is lost costs nothing, and neither does the time without a
coordinator: a file keeps up to where each node's totals were taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic

from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.ledger.booking import pool_of
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import FedtideError, MalformedMessage
from fedtide.fabric.events.costs import UsageReported, UsedFor
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.prices import Phase
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.metering import Meter
from fedtide.fabric.strict import Message

log = logging.getLogger(__name__)

LOG_EVERY_S = 900.0
_Key = tuple[str, str, Phase, str]


class Totals(Message):
    """What a node has told of itself, since its agent started for the `boot`th time."""

    boot: str
    used: Usage
    wasted: Usage
    inferences: int


class Kept(Message):
    """`items`: what is not logged. `seen`: up to where each node's totals were taken."""

    items: list[UsedFor] = []
    seen: dict[str, Totals] = {}


class Metering:
    """One for the time that this process leads."""

    def __init__(
        self,
        engine: Engine,
        stored: Callable[[], Mapping[str, int]],
        helpers: Callable[[], Iterable[int]],
        file: Path,
    ) -> None:
        """
        Args:
            helpers: processes that work for this one; what they start reports for itself.
            stored: bytes in the streams of each region; the hub's under an empty name.
            file: what this process knows, for the next one.
        """
        self._engine = engine
        self._stored = stored
        self._file = file
        self._items: dict[_Key, UsedFor] = {}
        self._seen: dict[str, Totals] = {}
        self._meter = Meter("self", helpers)
        self._began = self._looked = monotonic()
        with suppress(OSError, MalformedMessage):
            kept = from_json(Kept, file.read_bytes(), str(file))
            self._seen |= kept.seen
            for item in kept.items:
                self._add(item)

    def heard(self, node: Node, beat: Heartbeat) -> None:
        """Add what a node has used since it was heard last.

        Of an agent that is older than this process, and was not heard by the one before, nobody knows what was logged.
        """
        now = Totals(boot=beat.boot, used=beat.used, wasted=beat.wasted, inferences=beat.inferences)
        before = self._seen.get(node.name)
        self._seen[node.name] = now
        if before is None and (beat.uptime_s is None or beat.uptime_s > monotonic() - self._began):
            return
        if before is None or before.boot != now.boot:
            before = Totals(boot=now.boot, used=Usage(), wasted=Usage(), inferences=0)
        region, pool = node.region, pool_of(node.capabilities.labels, node.capabilities.hardware)
        served = max(now.inferences - before.inferences, 0)
        phase: Phase = "serve" if served else "idle"
        self._add(UsedFor(region=region, pool=pool, phase=phase, usage=now.used - before.used, inferences=served))
        self._add(
            UsedFor(region=region, pool=pool, phase="train", wasted="cancelled", usage=now.wasted - before.wasted)
        )

    def _add(self, item: UsedFor) -> None:
        key = item.region, item.pool, item.phase, item.wasted
        sum_ = self._items.get(key, UsedFor(region=item.region, pool=item.pool, phase=item.phase, wasted=item.wasted))
        self._items[key] = sum_.model_copy(
            update={
                "usage": sum_.usage + item.usage,
                "inferences": sum_.inferences + item.inferences,
                "stored_kb_s": sum_.stored_kb_s + item.stored_kb_s,
            }
        )

    def unlogged(self) -> list[UsedFor]:
        """What is not in the log yet, up to now."""
        now = monotonic()
        seconds, self._looked = now - self._looked, now
        self._add(UsedFor(phase="coordinate", usage=Usage(**self._meter.mark()._asdict())))
        for region, size in self._stored().items():
            self._add(UsedFor(region=region, phase="store", stored_kb_s=round(seconds * size / 1000)))
        return list(self._items.values())

    async def keep(self) -> None:
        """Log what was added up, for ever."""
        while True:
            await asyncio.sleep(LOG_EVERY_S)
            try:
                await self._log()
                self.save()
            except (FedtideError, OSError) as exc:
                log.warning("metering.logs_later", extra={"reason": str(exc)})

    async def _log(self) -> None:
        items, self._items = self.unlogged(), {}
        used = [item for item in items if item.usage or item.inferences or item.stored_kb_s]
        try:
            if used:
                await self._engine.submit(UsageReported(source="coordinator", items=used))
        except FedtideError:
            for item in used:
                self._add(item)
            raise

    def save(self) -> None:
        """Raises OSError: the disk is full."""
        seen = {name: totals for name, totals in self._seen.items() if name in self._engine.world.nodes}
        write_atomically(self._file, to_json(Kept(items=self.unlogged(), seen=seen)))
