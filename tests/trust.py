"""Keys and metadata of an installation for tests, in the hands of everybody who has some."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.libraries import CryptoSigner
from fedtide.fabric.trust.signatures import Mandate, RunSigner, mandate_of

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@dataclass
class Keys:
    """One key each."""

    root: CryptoSigner = field(default_factory=keys.new)
    timestamp: CryptoSigner = field(default_factory=keys.new)
    director: CryptoSigner = field(default_factory=keys.new)
    publisher: CryptoSigner = field(default_factory=keys.new)
    releases: CryptoSigner = field(default_factory=keys.new)

    @property
    def offline(self) -> ceremony.Offline:
        return ceremony.Offline([self.root.public_key], 1, [self.timestamp.public_key])

    def roles(self, **scopes: list[str]) -> dict[str, ceremony.Role]:
        return {
            "director": ceremony.role_of("director", [self.director.public_key]),
            "publisher-al": ceremony.role_of("publisher-al", [self.publisher.public_key], scopes.get("apps", ())),
            "releases": ceremony.role_of("releases", [self.releases.public_key], scopes.get("models", ())),
        }


@dataclass
class Published:
    """What an installation has published; `after` is what it publishes later."""

    keys: Keys
    metadata: TrustMetadata
    version: int = 1
    targets: int = 1

    @classmethod
    def first(cls, at: datetime = NOW, **scopes: list[str]) -> Published:
        of = Keys()
        root = ceremony.new_root(of.offline, [of.root], at)
        targets = ceremony.targets(of.roles(**scopes), [of.root], at)
        timestamp, snapshot = ceremony.vouched(1, 1, of.timestamp, at)
        return cls(of, TrustMetadata(roots=[root], timestamp=timestamp, snapshot=snapshot, targets=targets))

    def vouched(self, days: float, by: CryptoSigner | None = None) -> Published:
        """The same, vouched for anew so many days later."""
        version, at = self.version + 1, NOW + timedelta(days=days)
        timestamp, snapshot = ceremony.vouched(self.targets, version, by or self.keys.timestamp, at)
        told = self.metadata.model_copy(update={"timestamp": timestamp, "snapshot": snapshot})
        return replace(self, metadata=told, version=version)

    def delegating(self, days: float, of: Keys, by: CryptoSigner | None = None, **scopes: list[str]) -> Published:
        """Other keys have what these had, but for the root."""
        at = NOW + timedelta(days=days)
        targets = ceremony.targets(of.roles(**scopes), [by or self.keys.root], at, self.targets + 1)
        told = self.metadata.model_copy(update={"targets": targets})
        changed = replace(self, keys=replace(of, root=self.keys.root, timestamp=self.keys.timestamp), metadata=told)
        return replace(changed, targets=self.targets + 1).vouched(days)

    def rooted(self, days: float, of: Keys) -> Published:
        """Another root, and all keys are others."""
        at = NOW + timedelta(days=days)
        root = ceremony.next_root(self.metadata.roots[-1], of.offline, [self.keys.root, of.root], at)
        targets = ceremony.targets(of.roles(), [of.root], at, self.targets + 1)
        told = self.metadata.model_copy(update={"roots": [*self.metadata.roots, root], "targets": targets})
        return replace(self, keys=of, metadata=told, targets=self.targets + 1).vouched(days)


def aggregator(of: Keys, run: str = "run-1", app: str = "a" * 64, ends_at: float = 9e9) -> RunSigner:
    """The aggregator of a run, with a mandate of the director."""
    speaker = RunSigner()
    mandate = Mandate(run=run, attempt=1, app=app, key=speaker.key, ends_at=ends_at)
    speaker.mandate = mandate_of([of.director], mandate)
    return speaker
