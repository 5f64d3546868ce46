"""News of the coordinator's log: wakes whoever shows something that an event is about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from fedtide.console import endpoints
from fedtide.console.client import AsyncClient
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.process.retry import Backoff

log = logging.getLogger(__name__)


class Topic:
    """`changed` is set when an event names one of `names`: runs, roll-outs, rules, models."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.changed = asyncio.Event()


class News:
    """Subscribers, and the one stream of events that they share."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._topics: set[Topic] = set()

    @contextmanager
    def topic(self) -> Iterator[Topic]:
        """One more subscriber, until the context ends."""
        topic = Topic()
        self._topics.add(topic)
        try:
            yield topic
        finally:
            self._topics.discard(topic)

    async def listen(self) -> NoReturn:
        """Read the events, from a coordinator that leads, until cancelled."""
        backoff, said = Backoff(), ""
        while True:
            try:
                async for event in self._client.stream(endpoints.watch_events()):
                    backoff.reset()
                    said = ""
                    self.tell(_names_in(event.data))
            except FedtideError as exc:
                if str(exc) != said:
                    said = str(exc)
                    log.warning("news.away", extra={"reason": said})
            self.tell(None)
            await backoff.wait()

    def tell(self, names: frozenset[str] | None) -> None:
        """Wake the topics that these names concern; None: all, as something may have been missed."""
        for topic in self._topics:
            if names is None or topic.names & names:
                topic.changed.set()


def _names_in(data: Mapping[str, Any]) -> frozenset[str]:
    """The names in an event: its own fields, and those one level below (`spec.model`, `manifest.model`)."""
    fields = list(data.values())
    for inner in data.values():
        if isinstance(inner, dict):
            fields += inner.values()
    return frozenset(value for value in fields if isinstance(value, str))
