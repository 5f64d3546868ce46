"""Configuration files of the embedded nats-servers: one hub, one leaf a region. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtide.fabric.nats.authority import TRUST
from fedtide.fabric.nats.streams import HUB_DOMAIN

MAX_PAYLOAD = "8MB"
AT_REST_KEY = "FEDTIDE_AT_REST_KEY"
FEATURES = "feature_flags { js_ack_fc_v2: true, js_api_reply_v2: true }"
"""Domain and account in the subjects of acknowledgements and answers, so that each can be let through by itself."""


@dataclass(frozen=True, slots=True)
class Trust:
    """`trust.conf` stands beside the server's configuration. A leaf links these accounts to the hub, by public key."""

    region_account: str = ""
    system_account: str = ""


@dataclass(frozen=True, slots=True)
class Store:
    """What every server of an installation may store (`room`, as nats-server writes sizes), and whether encrypted.

    The key is in the server's environment as `AT_REST_KEY`: what is on the disk does not open what is on the disk.
    """

    room: str = "64GB"
    encrypted: bool = False

    def options(self) -> str:
        secret = f", cipher: chachapoly, key: ${AT_REST_KEY}" if self.encrypted else ""
        return f"max_mem: 256MB, max_file: {self.room}{secret}"


DEFAULT_STORE = Store()


def hub(
    port: int,
    leaf_port: int,
    store: Path,
    trust: Trust | None = None,
    monitor: int | None = None,
    kept: Store = DEFAULT_STORE,
) -> str:
    """A hub that listens on loopback for clients and leaves; without `trust` no credentials are needed.

    Args:
        monitor: the port of its health and figures, on loopback too.
    """
    return f"""server_name: hub
{_believes(trust, store)}listen: 127.0.0.1:{port}
{_monitor(monitor)}max_payload: {MAX_PAYLOAD}
{FEATURES}
jetstream {{ store_dir: "{store}", domain: {HUB_DOMAIN}, {kept.options()} }}
leafnodes {{ listen: 127.0.0.1:{leaf_port}, no_advertise: true }}
"""


def leaf(
    region: str,
    port: int,
    hub_leaf_port: int,
    store: Path,
    trust: Trust | None = None,
    monitor: int | None = None,
    kept: Store = DEFAULT_STORE,
) -> str:
    """A region's leaf with its own JetStream domain; its credentials stand beside `store`."""
    return f"""server_name: leaf-{region}
{_believes(trust, store)}listen: 127.0.0.1:{port}
{_monitor(monitor)}max_payload: {MAX_PAYLOAD}
{FEATURES}
jetstream {{ store_dir: "{store}", domain: "{region}", {kept.options()} }}
leafnodes {{ reconnect: 1s, remotes: [ {_remotes(hub_leaf_port, store, trust)} ] }}
"""


def identity_of(store: Path) -> Path:
    """Where the credentials of a region's processes are, beside the store of its server."""
    return store.with_name(f"{store.name}-identity")


def resolver_of(store: Path) -> Path:
    """Where a server keeps the accounts that it was told of."""
    return store.with_name(f"{store.name}-accounts")


def _monitor(port: int | None) -> str:
    return "" if port is None else f"http: 127.0.0.1:{port}\n"


def _believes(trust: Trust | None, store: Path) -> str:
    if trust is None:
        return ""
    # A full resolver stores account updates across restarts: a revoked key stays revoked.
    return f'''include "{TRUST}"
resolver: {{ type: full, dir: "{resolver_of(store)}", allow_delete: false, interval: "10m" }}
'''


def _remotes(hub_leaf_port: int, store: Path, trust: Trust | None) -> str:
    url = f'url: "nats-leaf://127.0.0.1:{hub_leaf_port}"'
    if trust is None:
        return f"{{ {url} }}"
    links = (trust.region_account, "leaf"), (trust.system_account, "system")
    return ", ".join(
        f'{{ {url}, account: {account}, credentials: "{identity_of(store)}/{name}.creds" }}' for account, name in links
    )
