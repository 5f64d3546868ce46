"""The keys and metadata that a new installation begins with. Pure.

Its offline keys are for the owner to take away: `fedtide trust` works with them wherever they are then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.libraries import CryptoSigner

ROOT = "trust-root.json"
ROOTS, TARGETS = "trust-roots.json", "trust-targets.json"
DIRECTOR_KEY, TIMESTAMP_KEY = "director.pem", "timestamp.pem"
ROOT_KEY, PUBLISHER_KEY, RELEASES_KEY = "root.pem", "publisher.pem", "releases.pem"
OWNER = "publisher-owner"

Texts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Begun:
    """Files by their names: what the coordinator has, what its release authority has, and what is kept offline."""

    coordinator: Texts
    authority: Texts
    offline: Texts


def begin(now: datetime) -> Begun:
    """A root with one key, one director, one publisher and one release authority."""
    root, director, timestamp, publisher, releases = (keys.new() for _ in range(5))
    of = ceremony.Offline([root.public_key], 1, [timestamp.public_key])
    first = ceremony.new_root(of, [root], now)
    roles = {
        ceremony.DIRECTOR: ceremony.role_of(ceremony.DIRECTOR, [director.public_key]),
        OWNER: ceremony.role_of(OWNER, [publisher.public_key]),
        ceremony.RELEASES: ceremony.role_of(ceremony.RELEASES, [releases.public_key]),
    }
    named = {ROOTS: json.dumps([first]), TARGETS: ceremony.targets(roles, [root], now)}
    return Begun(
        coordinator={**named, DIRECTOR_KEY: _pem(director), TIMESTAMP_KEY: _pem(timestamp)},
        authority={**named, RELEASES_KEY: _pem(releases)},
        offline={**named, ROOT_KEY: _pem(root), PUBLISHER_KEY: _pem(publisher)},
    )


def _pem(signer: CryptoSigner) -> str:
    return signer.private_bytes.decode()
