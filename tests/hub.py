"""How tests connect to a hub: as its coordinator does."""

from __future__ import annotations

from dataclasses import dataclass

from fedtide.console.home import Home
from fedtide.fabric.nats.authority import COORDINATOR
from fedtide.fabric.nats.broker import NO_ACCESS, Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.trust import keys
from fedtide.fabric.trust.installation import DIRECTOR_KEY, RELEASES_KEY
from fedtide.fabric.trust.libraries import Signer


@dataclass(frozen=True)
class Hub:
    url: str
    access: Access = NO_ACCESS
    home: Home | None = None

    @classmethod
    def of(cls, home: Home, url: str) -> Hub:
        """That of an embedded installation."""
        return cls(url, Access(home.identity / COORDINATOR), home)

    @property
    def director(self) -> list[Signer]:
        """The keys of its director, if it has one."""
        return [keys.load(self.home.identity / DIRECTOR_KEY)] if self.home is not None else []

    @property
    def releases(self) -> list[Signer]:
        """Those of its release authority."""
        return [keys.load(self.home.release_authority / RELEASES_KEY)] if self.home is not None else []

    async def connect(self, name: str) -> Broker:
        return await Broker.connect(self.url, name, self.access)
