"""Reports of nodes and aggregators: checked, applied, acknowledged; what cannot be applied is parked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from fedtide.coordinator.identity import identities
from fedtide.coordinator.identity.report_rules import why_refused
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.log.parked import ParkedReports
from fedtide.coordinator.log.report_rates import ReportRates
from fedtide.fabric.errors import InvalidTransition, MalformedMessage, NotFound, TooLarge
from fedtide.fabric.events.envelope import Event, decode_event
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Delivery
from fedtide.fabric.nats.subjects import COLLECTOR, HUB_REGION, Report, Subjects, parse_as, up_stream

DURABLE = "coordinator"
_WAITING = 10_000
LONGEST_ID, LONGEST_TEXT = 200, 100_000
LARGEST_OF_NODE = 256 * 1024
_LARGEST_INTEGER = 2**63


class Reports:
    """Takes reports from the stream of each region, and of the processes beside the hub, each in its order."""

    def __init__(
        self,
        broker: Broker,
        subjects: Subjects,
        engine: Engine,
        parked: ParkedReports,
        regions: Sequence[str],
        *,
        members_only: bool = False,
        room: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """
        Args:
            members_only: nodes have identities, and nobody else is believed.
            room: returns once the log has room for a report of so many bytes.
        """
        self._members_only = members_only
        self._room = room
        self._rates = ReportRates()
        self._broker = broker
        self._regions = regions
        self._subjects = subjects
        self._engine = engine
        self.parked = parked
        self._to_acknowledge: asyncio.Queue[tuple[Delivery, asyncio.Future[None]]] = asyncio.Queue(maxsize=_WAITING)

    async def listen(self, leads: Callable[[], Awaitable[None]]) -> None:
        """Take in reports for ever; each is acknowledged once it is in the log, or parked.

        Args:
            leads: returns once it is certain that this process still leads.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._acknowledge(), name="acknowledge")
            for region in (HUB_REGION, *self._regions):
                group.create_task(self._take_in(region, leads), name=f"reports-{region}")

    async def _take_in(self, region: str, leads: Callable[[], Awaitable[None]]) -> None:
        stream, pattern = up_stream(region), self._subjects.reports_of(region)
        async for delivery in self._broker.consume(stream, DURABLE, pattern, may_ask=leads):
            if self._room is not None:
                await self._room(len(delivery.data))
            try:
                self._count(delivery)
                event = self._checked(delivery.subject, delivery.data)
            except MalformedMessage as exc:
                await self.parked.park(delivery.subject, delivery.data, str(exc))
                await delivery.ack()
            else:
                await self._to_acknowledge.put((delivery, await self._engine.put(event)))

    async def _acknowledge(self) -> None:
        while True:
            delivery, done = await self._to_acknowledge.get()
            try:
                await done
            except (InvalidTransition, TooLarge) as exc:
                await self.parked.park(delivery.subject, delivery.data, str(exc))
            await delivery.ack()

    async def retry(self, id: str) -> None:
        """Apply a parked report now.

        Raises:
            NotFound: there is none, or only its beginning was kept.
            MalformedMessage, InvalidTransition, TooLarge: it still cannot be applied.
        """
        report = await self.parked.get(id)
        if not report.whole:
            raise NotFound(f"of the parked report {id} only the beginning was kept", "Drop it")
        await (await self._engine.put(self._checked(report.subject, report.raw)))
        await self.parked.drop(id)

    def _count(self, delivery: Delivery) -> None:
        sender, size = parse_as(Report, delivery.subject), len(delivery.data)
        if sender.region != HUB_REGION and size > LARGEST_OF_NODE:
            raise MalformedMessage(f"a node's report has at most {LARGEST_OF_NODE} bytes, this one {size}")
        reason = self._rates.why_too_many(sender, size, asyncio.get_running_loop().time())
        if reason is not None:
            raise MalformedMessage(reason)

    def _checked(self, subject: str, data: bytes) -> Event:
        """The event of a report. Time and decisions are the coordinator's: those that a sender wrote do not count.

        Raises:
            MalformedMessage: it is none, too large in some value, or not what its sender may report.
        """
        event = decode_event(data)
        if reason := why_unbounded(event):
            raise MalformedMessage(f"{event.data.kind}: {reason}")
        sender = parse_as(Report, subject)
        reason = why_refused(sender, event.data)
        if reason is None and self._members_only and sender.region != HUB_REGION and sender.node != COLLECTOR:
            reason = identities.why_no_member(self._engine.world.identities, sender.region, sender.node)
        if reason is not None:
            raise MalformedMessage(reason)
        # Nobody names what another one, or the coordinator itself, is about to report.
        known_as = f"{sender.region}/{sender.node}/{event.id}"
        return event.model_copy(update={"id": known_as, "time": datetime.now(UTC), "decided": ""})


def why_unbounded(event: Event) -> str | None:
    """Which value of an event from outside no reducer has to be able to take; None if there is none.

    Not in the types: events that were logged before a bound existed must stay readable.
    """
    if len(event.id) > LONGEST_ID or not event.id.isprintable():
        return f"its id has more than {LONGEST_ID} characters, or some that cannot be printed"
    return _why_unbounded(event.data, "data")


def _why_unbounded(value: Any, path: str) -> str | None:
    match value:
        case bool() | None:
            return None
        case int() if abs(value) >= _LARGEST_INTEGER:
            return f"{path} is a number of more than 64 bits"
        case str() if len(value) > LONGEST_TEXT:
            return f"{path} has more than {LONGEST_TEXT} characters"
        case BaseModel():
            inner: Any = ((f"{path}.{name}", each) for name, each in value)
        case dict():
            inner = (pair for k, v in value.items() for pair in ((f"a key of {path}", k), (f"{path}.{k}", v)))
        case list() | tuple() | set() | frozenset():
            inner = ((f"an item of {path}", each) for each in value)
        case _:
            return None
    return next((reason for where, each in inner if (reason := _why_unbounded(each, where))), None)
