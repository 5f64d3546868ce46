"""`python -m fedtide.coordinator.adapters.identity_job`: what a Helm hook runs before an install or upgrade.

Creates the installation's Secrets if they are missing, and renews certificates before they expire. What
exists is kept: a new authority would have to be installed on every node. On a schedule (`--renew`) it renews all
that may be renewed without that.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fedtide.coordinator.identity.installation_secrets import UNLIMITED, Files, Wants, complete
from fedtide.fabric.cluster.connection import api_client
from fedtide.fabric.cluster.restarts import restart
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.nats.authority import FILE, SIGNER, Authority
from fedtide.fabric.nats.backup_file import identity_in, opened
from fedtide.fabric.nats.backup_store import BackupStore
from fedtide.fabric.trust.installation import ROOTS
from fedtide.fabric.trust.installation import begin as begin_trust

_CONFLICT, _MISSING = 409, 404


SERVERS = "hub-servers"
"""In the Secret of the servers: how many the hub has. It cannot change in place, and GitOps tools do not let a chart
look at what is installed: the hook can."""
STORAGE = "hub-storage"
"""There too, for the same reason: how large the hub's volumes are. `fedtide k8s grow` changes it."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What the Secrets are for, as a release of the chart says.

    `hosts`: names and addresses of the servers. `servers`, `storage`: how many the hub has, and how large each one's
    volume is; 0 and empty: the hub is not of this release.
    """

    namespace: str
    name: str
    tenant: str
    hosts: list[str]
    regions: list[str]
    servers: int = 0
    storage: str = ""


def keep(api: Any, of: Installed, restored: Callable[[], Files] = dict, wants: Wants = UNLIMITED) -> list[str]:
    """Complete the Secrets `NAME-identity` and `NAME-servers`; returns the names of those that changed.

    An installation without a root gets one: `NAME-release-authority` has the key that vouches for releases, and
    `NAME-trust-offline` those of root and publisher, which their owner takes away.

    Args:
        restored: the identity of a backup, for an installation that has none.
        wants: as of `complete`.

    Raises:
        ApiException: the API server refuses.
        ConfigError: the hub has another number of servers, or other volumes; nothing has changed.
    """
    namespace, name, servers, storage = of.namespace, of.name, of.servers, of.storage
    names = f"{name}-identity", f"{name}-servers"
    found = [_read(api, namespace, secret) for secret in names]
    there = (found[1] or {}).get(SERVERS, "")
    if servers and there and there != str(servers):
        raise ConfigError(
            "nats.replicas",
            f"is {servers} where {there} are installed: a hub cannot change from one server to three in place, and its "
            "streams would be lost",
            f"Install a second release and move. If the hub's volumes are gone, remove {SERVERS} from {names[1]}",
        )
    volumes = (found[1] or {}).get(STORAGE, "")
    if storage and volumes and volumes != storage:
        raise ConfigError(
            "nats.storage.size",
            f"is {storage} where {volumes} is installed: a StatefulSet's volumes cannot be changed in place",
            f"First: fedtide k8s grow {storage} --namespace {namespace} --name {name}",
        )
    own = found[0] if found[0] is not None else restored()
    wanted = complete(own, found[1] or {}, of.tenant, of.hosts, of.regions, wants)
    if servers:
        wanted[1][SERVERS] = str(servers)
    if storage:
        wanted[1][STORAGE] = storage
    begun = None if ROOTS in own else begin_trust(datetime.now(UTC))
    if begun is not None:
        wanted[0].update(begun.coordinator)
    changed = []
    for secret, old, new in zip(names, found, wanted, strict=True):
        if old != new:
            _write(api, namespace, secret, new, exists=old is not None)
            changed.append(secret)
    if begun is not None:
        signer = Authority.parse(wanted[0][FILE].encode()).of_release_authority().text
        kept = {"release-authority": {**begun.authority, SIGNER: signer}, "trust-offline": begun.offline}
        for what, files in kept.items():
            secret = f"{name}-{what}"
            _write(api, namespace, secret, files, exists=_read(api, namespace, secret) is not None)
            changed.append(secret)
    return changed


def _identity_of(url: str) -> Files:
    with BackupStore(url).opened() as (named, whole), opened(Path(named), whole) as (archive, _):
        return dict(identity_in(archive))


def _read(api: Any, namespace: str, name: str) -> Files | None:
    try:
        secret = api.read_namespaced_secret(name, namespace)
    except ApiException as exc:
        if exc.status == _MISSING:
            return None
        raise
    return {k: base64.b64decode(v).decode() for k, v in (secret.data or {}).items()}


def _write(api: Any, namespace: str, name: str, files: Mapping[str, str], *, exists: bool) -> None:
    # Not a part of the release: `helm uninstall` must not take the fleet's authority with it.
    labels = {"app.kubernetes.io/part-of": "fedtide", "app.kubernetes.io/managed-by": "fedtide"}
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "type": "Opaque",
        "data": {k: base64.b64encode(v.encode()).decode() for k, v in files.items()},
    }
    if exists:
        api.patch_namespaced_secret(name, namespace, {"data": body["data"]})
        return
    api.create_namespaced_secret(namespace, body)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--name", required=True, help="The Secrets are called NAME-identity and NAME-servers")
    parser.add_argument("--tenant", default="default")
    parser.add_argument("--hosts", required=True, help="Names and addresses of the servers, separated by commas")
    parser.add_argument("--regions", default="", help="Names of the regions, separated by commas")
    parser.add_argument("--servers", type=int, default=0, help="Of the hub; 0: it is not of this release")
    parser.add_argument("--restore", default="", help="URL of a backup: its identity goes before a new one")
    parser.add_argument("--storage", default="", help="Of each of the hub's volumes")
    parser.add_argument("--lifetime-days", type=float, help="After which the coordinators' credentials end; never")
    parser.add_argument("--renew", action="store_true", help="Certificate and credentials anew in any case")
    parser.add_argument("--restart", action="append", default=[], help="KIND/NAME that gets new pods then; repeat")
    asked = parser.parse_args()
    try:
        hosts, regions = asked.hosts.split(","), [name for name in asked.regions.split(",") if name]
        api = client.CoreV1Api(api_client())
        restored = partial(_identity_of, asked.restore) if asked.restore else dict
        wants = Wants(asked.lifetime_days * 86400 if asked.lifetime_days else None, asked.renew)
        of = Installed(asked.namespace, asked.name, asked.tenant, hosts, regions, asked.servers, asked.storage)
        changed = keep(api, of, restored, wants)
        restarted = restart(api.api_client, asked.namespace, asked.restart)
    except FedtideError as exc:
        print(f"fedtide identity: {exc}", file=sys.stderr)
        return exc.exit_code
    except ApiException as exc:
        remedy = "The hook's service account needs to get, create and patch Secrets here"
        print(f"fedtide identity: the API server says {exc.status} {exc.reason}. {remedy}", file=sys.stderr)
        return 1
    print(f"changed: {', '.join(changed) or 'nothing'}; restarted: {', '.join(restarted) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
