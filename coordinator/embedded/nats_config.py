"""Configuration files of the embedded nats-servers: one hub, one leaf a region. Pure."""

from __future__ import annotations

from pathlib import Path

from fabric.streams import HUB_DOMAIN

MAX_PAYLOAD = "8MB"


def hub(port: int, leaf_port: int, store: Path) -> str:
    """A hub that listens on loopback for clients and leaves."""
    return f"""server_name: hub
listen: 127.0.0.1:{port}
max_payload: {MAX_PAYLOAD}
jetstream {{ store_dir: "{store}", domain: {HUB_DOMAIN}, max_mem: 256MB, max_file: 64GB }}
leafnodes {{ listen: 127.0.0.1:{leaf_port}, no_advertise: true }}
"""


def leaf(region: str, port: int, hub_leaf_port: int, store: Path) -> str:
    """A region's leaf with its own JetStream domain."""
    return f"""server_name: leaf-{region}
listen: 127.0.0.1:{port}
max_payload: {MAX_PAYLOAD}
jetstream {{ store_dir: "{store}", domain: {region}, max_mem: 256MB, max_file: 64GB }}
leafnodes {{ reconnect: 1s, remotes: [ {{ url: "nats-leaf://127.0.0.1:{hub_leaf_port}" }} ] }}
"""
