"""Larger volumes for a hub or leaf: what a StatefulSet does not allow to be changed, done around it.

https://kubernetes.io/docs/concepts/storage/persistent-volumes/#expanding-persistent-volumes-claims
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.utils.quantity import parse_quantity

from fedtide.fabric.errors import ConfigError, NotFound


def grow(api: client.ApiClient, namespace: str, servers: str, size: str) -> Iterator[str]:
    """Ask for larger volumes, and let go of the StatefulSet, which the next `helm upgrade` makes anew around its pods.

    Says what it does, step by step. Again it goes on where it was broken off.

    Args:
        servers: name of the StatefulSet.
        size: of each volume, e.g. `20Gi`.

    Raises:
        NotFound: there are no volumes of such servers.
        ConfigError: the size is none, or smaller than what is there, or the volumes' class cannot grow.
    """
    core, apps = client.CoreV1Api(api), client.AppsV1Api(api)
    claims = [c for c in core.list_namespaced_persistent_volume_claim(namespace).items if _is_of(c, servers)]
    if not claims:
        raise NotFound(f"there are no volumes of {servers} in {namespace}", "Name the namespace and the release")
    for claim in claims:
        _check(client.StorageV1Api(api), claim, size)
    for claim in claims:
        name = claim.metadata.name
        if _bytes(claim.spec.resources.requests["storage"]) < _bytes(size):
            body = {"spec": {"resources": {"requests": {"storage": size}}}}
            core.patch_namespaced_persistent_volume_claim(name, namespace, body)
            yield f"{name}: {claim.spec.resources.requests['storage']} -> {size}"
    _note(core, namespace, servers, size)
    try:
        apps.delete_namespaced_stateful_set(servers, namespace, propagation_policy="Orphan")
        yield f"{servers}: let go of; its pods go on"
    except ApiException as exc:
        if exc.status != HTTPStatus.NOT_FOUND:
            raise


def _note(core: client.CoreV1Api, namespace: str, servers: str, size: str) -> None:
    """The cloud chart's hook knows the size from the Secret of the servers; a region has none."""
    name = f"{servers.rpartition('-')[0]}-servers"
    try:
        core.patch_namespaced_secret(name, namespace, {"stringData": {"hub-storage": size}})
    except ApiException as exc:
        if exc.status != HTTPStatus.NOT_FOUND:
            raise


def _is_of(claim: Any, servers: str) -> bool:
    name, _, number = claim.metadata.name.rpartition("-")
    return bool(name == f"data-{servers}" and number.isdecimal())


def _check(storage: client.StorageV1Api, claim: Any, size: str) -> None:
    now = claim.spec.resources.requests["storage"]
    if _bytes(size) < _bytes(now):
        raise ConfigError("size", f"{size} is less than the {now} of {claim.metadata.name}: a volume does not shrink")
    kind = storage.read_storage_class(claim.spec.storage_class_name)
    if not kind.allow_volume_expansion:
        raise ConfigError(
            f"storage class {kind.metadata.name}",
            "its volumes cannot grow",
            "Back up (docs/kubernetes.md), install a release with another class, and restore",
        )


def _bytes(size: str) -> Any:
    try:
        return parse_quantity(size)
    except ValueError as exc:
        raise ConfigError("size", f"{size!r} is no size", "For example 20Gi") from exc
