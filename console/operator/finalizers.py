"""Takes the operator's finalizers away when it is uninstalled: what it leaves behind can be deleted without it."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fedtide.console.operator.handlers import FINALIZER
from fedtide.console.operator.resources import GROUP, KINDS, VERSION
from fedtide.fabric.cluster.connection import api_client

log = logging.getLogger(__name__)

PAGE = 200


def let_go(namespace: str) -> int:
    """Take our finalizer from every resource of the namespace; returns from how many.

    Raises:
        ApiException: the API server refuses, or is not there.
    """
    api, count = client.CustomObjectsApi(api_client()), 0
    for plural in KINDS:
        for each in _all(api, namespace, plural):
            meta = each["metadata"]
            if FINALIZER not in meta.get("finalizers", []):
                continue
            left = [name for name in meta["finalizers"] if name != FINALIZER]
            # The version: a finalizer that somebody adds meanwhile must not be lost.
            patch = {"metadata": {"finalizers": left, "resourceVersion": meta["resourceVersion"]}}
            _patched(api, namespace, plural, meta["name"], patch)
            count += 1
    log.info("operator.let_go", extra={"resources": count})
    return count


def _all(api: client.CustomObjectsApi, namespace: str, plural: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    following = None
    while following != "":
        try:
            page = api.list_namespaced_custom_object(
                GROUP, VERSION, namespace, plural, limit=PAGE, _continue=following or ""
            )
        except ApiException as exc:
            if exc.status == HTTPStatus.NOT_FOUND:
                return found  # there is no such kind here (any more)
            raise
        found += page["items"]
        following = page["metadata"].get("continue", "")
    return found


def _patched(api: client.CustomObjectsApi, namespace: str, plural: str, name: str, patch: dict[str, Any]) -> None:
    try:
        api.patch_namespaced_custom_object(GROUP, VERSION, namespace, plural, name, patch)
    except ApiException as exc:
        if exc.status != HTTPStatus.NOT_FOUND:
            raise
