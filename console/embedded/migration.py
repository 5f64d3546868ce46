"""Brings an embedded installation of a version before 0.2 to accounts of their own for regions, runs and nodes.

The hub's streams stay where they are: their account keeps its name. A region's streams belong to another account from
now on, so the folder of the old one becomes the new one's; what its server had not sent yet is sent then. All
credentials are void; nodes enrol again, with the join token of the installation.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from fedtide.console.embedded import nats_config
from fedtide.console.home import Home
from fedtide.fabric.nats.accounts import CORE, leaf_account
from fedtide.fabric.nats.authority import Authority


def begin(home: Home, authority: Authority, regions: Sequence[str]) -> None:
    """Move the streams of regions, remove what is void, and save the authority last: this may be done again."""
    for region in regions:
        streams = home.store(region) / "jetstream"
        old, new = streams / authority.public(CORE), streams / authority.public(leaf_account(region))
        if old.exists() and not new.exists():
            # A mirror is read from the hub again: it has another consumer there.
            shutil.rmtree(old / "streams" / "DOWN", ignore_errors=True)
            old.rename(new)
        for stale in (nats_config.identity_of(home.store(region)), nats_config.resolver_of(home.store(region))):
            shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(nats_config.resolver_of(home.store("hub")), ignore_errors=True)
    for credentials in (home.root / "nodes").glob("*/identity.creds"):
        credentials.unlink()
    authority.save(home.identity, regions)
