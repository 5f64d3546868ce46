"""What no event tells: agents between tasks, this process, stores. Added up from heartbeats, and logged now and then.

Heartbeats tell totals since the agent started, so one that is lost costs nothing, and neither does the time without a
coordinator: a file keeps up to where each node's totals were taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic

from fedtide.coordinator.fleet.fleet import Node
from fedtide.coordinator.ledger.booking import AGGREGATORS, pool_of
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import FedtideError, MalformedMessage
from fedtide.fabric.events.costs import Availability, UsageReported, UsedFor
from fedtide.fabric.ids import is_token
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.usage import MOST, MOST_CPUS, MOST_MEMORY, Usage, possible
from fedtide.fabric.nats.subjects import COLLECTOR, FOLD_WORKER
from fedtide.fabric.plans.prices import Phase
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.metering import Meter
from fedtide.fabric.strict import Message

log = logging.getLogger(__name__)

LOG_EVERY_S = 900.0
LONGEST_S, SLACK_S = 7 * 86_400.0, 5.0
"""Between two heartbeats, at most; and what clocks and queues may add."""
MOST_POOLS, ITEMS_OF_ONE = 32, 1000
"""Of one region; and of one report."""
MOST_INFERENCES_A_SECOND = 1e6
SERVERS = "nats-servers"
"""The pool of the hub's servers."""
WORKERS: Mapping[str, tuple[str, Phase]] = {
    COLLECTOR: ("collectors", "coordinate"),
    FOLD_WORKER: (AGGREGATORS, "aggregate"),
}
"""Of a region: pool, and what they work for when it is for no run."""
_Key = tuple[str, str, Phase, str]


class Totals(Message):
    """What a node has told of itself, since its agent started for the `boot`th time."""

    boot: str
    used: Usage
    wasted: Usage
    inferences: int


class Kept(Message):
    """`after`: the last report that was logged. `items`: what is not logged. `seen`: up to where totals were taken."""

    after: str = ""
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
        *,
        is_tenants: bool = False,
    ) -> None:
        """
        Args:
            helpers: processes that work for this one; what they start reports for itself.
            stored: bytes in the streams of each region; the hub's under an empty name.
            file: what this process knows, for the next one.
            is_tenants: the process serves others too, and is the installation's to pay.
        """
        self._engine = engine
        self._stored = stored
        self._file = file
        self._items: dict[_Key, UsedFor] = {}
        self._seen: dict[str, Totals] = {}
        self._meter = Meter("none" if is_tenants else "self", helpers)
        self._began = self._looked = monotonic()
        self._heard_at: dict[str, float] = {}
        self._left: dict[str, tuple[Usage, int]] = {}
        """By who tells: what it can have used beyond what was booked, and inferences."""
        self._busy: set[str] = set()
        self._pools: dict[str, set[str]] = {}
        self._kept: Kept | None = None
        with suppress(OSError, MalformedMessage):
            self._kept = from_json(Kept, file.read_bytes(), str(file))

    def begin(self) -> None:
        """Go on from the file, now that the log is known: another process may have led since it was written."""
        if self._kept is not None and self._kept.after == self._engine.world.metered:
            self._seen |= self._kept.seen
            for item in self._kept.items:
                self._add(item)

    def heard(self, node: Node, beat: Heartbeat) -> None:
        """Add what a node has used since it was heard last, as far as it can have used that.

        Of an agent that is older than this process, and was not heard by the one before, nobody knows what was logged.
        """
        (self._busy.add if beat.busy is not None else self._busy.discard)(node.name)
        can = node.capabilities
        new = self._news(node.name, beat, can.cpus, can.memory_bytes)
        region, pool, served, used, wasted = node.region, self._pool(node), new.inferences, new.used, new.wasted
        phase: Phase = "serve" if served else "idle"
        if used or served:
            self._add(UsedFor(region=region, pool=pool, phase=phase, usage=used, inferences=served))
        if wasted:
            self._add(UsedFor(region=region, pool=pool, phase="train", wasted="cancelled", usage=wasted))

    def heard_worker(self, region: str, name: str, beat: Heartbeat) -> None:
        """As `heard`, of a region's drift collector or regional aggregator: what the latter used for no run."""
        if not is_token(region):  # it is a part of a line's key
            return
        used = self._news(f"{region}/{name}", beat, MOST_CPUS, MOST_MEMORY).used
        pool, phase = WORKERS[name]
        if used:
            self._add(UsedFor(region=region, pool=pool, phase=phase, usage=used))

    def heard_server(self, usage: Usage) -> None:
        """Of a server of the hub, since it was heard last."""
        self._add(UsedFor(pool=SERVERS, phase="coordinate", usage=usage))

    def _news(self, key: str, beat: Heartbeat, cpus: int, memory_bytes: int) -> Totals:
        """What is new in a heartbeat, as far as it was possible.

        What is possible grows with the time, and is used up: however often it is told, and from whichever start on.
        """
        now, at = Totals(boot=beat.boot, used=beat.used, wasted=beat.wasted, inferences=beat.inferences), monotonic()
        nothing = Totals(boot=now.boot, used=Usage(), wasted=Usage(), inferences=0)
        before, heard_at = self._seen.get(key), self._heard_at.get(key)
        self._seen[key], self._heard_at[key] = now, at
        slack = possible(SLACK_S, cpus, memory_bytes), round(SLACK_S * MOST_INFERENCES_A_SECOND)
        left, left_inferences = self._left.setdefault(key, slack)
        uptime = beat.uptime_s if beat.uptime_s is not None else LONGEST_S
        if before is None and uptime > at - self._began:
            return nothing
        if before is None or before.boot != now.boot:
            before = nothing
        first = min(uptime, at - self._began)
        seconds = min(at - heard_at if heard_at is not None else first, LONGEST_S)
        left = left + possible(seconds, cpus, memory_bytes)
        left_inferences += round(seconds * MOST_INFERENCES_A_SECOND)
        used = (now.used - before.used).within(left)
        wasted = (now.wasted - before.wasted).within(left - used)
        inferences = min(max(now.inferences - before.inferences, 0), left_inferences)
        # Not for ever: who was quiet for a month cannot have used it all in its last second.
        most = possible(LONGEST_S, cpus, memory_bytes)
        self._left[key] = ((left - used - wasted).within(most), left_inferences - inferences)
        return Totals(boot=now.boot, used=used, wasted=wasted, inferences=inferences)

    def _pool(self, node: Node) -> str:
        """Nodes name their pools: a region has a limited number of them, and the rest is one."""
        pool = pool_of(node.capabilities.labels, node.capabilities.hardware)
        pools = self._pools.setdefault(node.region, set())
        if pool not in pools and len(pools) >= MOST_POOLS:
            return ""
        pools.add(pool)
        return pool

    def _add(self, item: UsedFor) -> None:
        key = item.region, item.pool, item.phase, item.wasted
        before = self._items.get(key, UsedFor(region=item.region, pool=item.pool, phase=item.phase, wasted=item.wasted))
        self._items[key] = UsedFor(
            region=item.region,
            pool=item.pool,
            phase=item.phase,
            wasted=item.wasted,
            usage=before.usage + item.usage,
            inferences=min(before.inferences + item.inferences, MOST),
            stored_kb_s=min(before.stored_kb_s + item.stored_kb_s, MOST),
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
            except FedtideError as exc:
                log.warning("metering.logs_later", extra={"reason": str(exc)})

    async def _log(self) -> None:
        items, self._items = self.unlogged(), {}
        used = [item for item in items if item.usage or item.inferences or item.stored_kb_s]
        available = self.available()
        while used:
            report = UsageReported(source="coordinator", items=used[:ITEMS_OF_ONE], available=available)
            try:
                await self._engine.submit(report)
            except BaseException:  # also when this is stopped while the log waits
                for item in used:
                    self._add(item)
                raise
            used, available = used[ITEMS_OF_ONE:], {}

    def available(self) -> dict[str, Availability]:
        """By region, now: how many nodes there are, and how many of them could train."""
        nodes = self._engine.world.members()
        of_all = Counter(node.region for node in nodes)
        free = Counter(node.region for node in nodes if node.online and node.name not in self._busy)
        return {region: Availability(nodes=count, free=free[region]) for region, count in of_all.items()}

    def save(self) -> None:
        """For the next process; without it, what is not logged is lost, and nothing else."""
        world = self._engine.world
        seen = {name: totals for name, totals in self._seen.items() if name in world.nodes or "/" in name}
        try:
            write_atomically(self._file, to_json(Kept(after=world.metered, items=self.unlogged(), seen=seen)))
        except OSError as exc:
            log.warning("metering.not_kept", extra={"reason": str(exc)})
