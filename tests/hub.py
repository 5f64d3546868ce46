"""How tests connect to a hub: as its coordinator does."""

from __future__ import annotations

from dataclasses import dataclass

from fedtide.console.home import Home
from fedtide.fabric.nats.authority import COORDINATOR
from fedtide.fabric.nats.broker import NO_ACCESS, Broker
from fedtide.fabric.nats.credentials import Access


@dataclass(frozen=True)
class Hub:
    url: str
    access: Access = NO_ACCESS

    @classmethod
    def of(cls, home: Home, url: str) -> Hub:
        """That of an embedded installation."""
        return cls(url, Access(home.identity / COORDINATOR))

    async def connect(self, name: str) -> Broker:
        return await Broker.connect(self.url, name, self.access)
