"""Checks whether a cluster has what the charts need: a list of findings, each with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fedtide.fabric.errors import TransientError

OLDEST = (1, 29)
_PROVISIONERS = "storageclass.kubernetes.io/is-default-class"

_NEEDED = (
    ("apps", "deployments"),
    ("apps", "statefulsets"),
    ("batch", "jobs"),
    ("", "secrets"),
    ("", "configmaps"),
    ("", "services"),
    ("rbac.authorization.k8s.io", "roles"),
    ("networking.k8s.io", "networkpolicies"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
)
_OPTIONAL = {
    "kueue.x-k8s.io": "aggregator.queue",
    "keda.sh": "regionalAggregators.keda",
    "cert-manager.io": "tls.certManager",
    "monitoring.coreos.com": "serviceMonitor",
}
_ACCELERATORS = ("nvidia.com/", "amd.com/gpu", "gpu.intel.com/")


@dataclass(frozen=True, slots=True)
class Finding:
    """`absent`: missing, but only optional features need it."""

    what: str
    outcome: Literal["ok", "missing", "absent"]
    detail: str
    remedy: str = ""


def examine(api: client.ApiClient, namespace: str) -> Iterator[Finding]:
    """Run all checks; only reads, and checks the user's permissions.

    Raises:
        TransientError: the API server does not answer.
    """
    try:
        yield _version(client.VersionApi(api).get_code())
        yield from _rights(client.AuthorizationV1Api(api), namespace)
        yield _storage(client.StorageV1Api(api).list_storage_class().items)
        yield from _nodes(client.CoreV1Api(api).list_node().items)
        groups = {group.name for group in client.ApisApi(api).get_api_versions().groups}
        for group, value in _OPTIONAL.items():
            if group in groups:
                yield Finding(group, "ok", "installed")
            else:
                yield Finding(group, "absent", "not installed", f"Leave {value} off, or install it")
    except ApiException as exc:
        raise TransientError(f"the Kubernetes API says {exc.status} {exc.reason}", "Are you allowed to look?") from exc
    except (urllib3.exceptions.HTTPError, OSError) as exc:
        raise TransientError(f"the Kubernetes API does not answer: {exc}", "Check KUBECONFIG") from exc


def _version(code: Any) -> Finding:
    major, minor = (int("".join(c for c in part if c.isdigit())) for part in (code.major, code.minor))
    if (major, minor) >= OLDEST:
        return Finding("Kubernetes", "ok", f"{major}.{minor}")
    return Finding("Kubernetes", "missing", f"{major}.{minor}", f"Upgrade it to {OLDEST[0]}.{OLDEST[1]} or newer")


def _rights(api: client.AuthorizationV1Api, namespace: str) -> Iterator[Finding]:
    denied = []
    for group, resource in _NEEDED:
        attributes = {"namespace": namespace, "verb": "create", "group": group, "resource": resource}
        review = {"spec": {"resourceAttributes": attributes}}
        if not api.create_self_subject_access_review(review).status.allowed:
            denied.append(resource)
    if denied:
        yield Finding("your rights", "missing", f"may not create {', '.join(denied)}", f"Ask for them in {namespace}")
    else:
        yield Finding("your rights", "ok", f"enough for an install in {namespace}")


def _storage(classes: list[Any]) -> Finding:
    defaults = [c.metadata.name for c in classes if (c.metadata.annotations or {}).get(_PROVISIONERS) == "true"]
    if defaults:
        return Finding("storage", "ok", f"default class {defaults[0]}")
    named = ", ".join(c.metadata.name for c in classes) or "none"
    return Finding("storage", "missing", f"no default class; there are: {named}", "Set nats.storage.className")


def _nodes(nodes: list[Any]) -> Iterator[Finding]:
    ready = [n for n in nodes if any(c.type == "Ready" and c.status == "True" for c in n.status.conditions or [])]
    if not ready:
        yield Finding("nodes", "missing", f"none of {len(nodes)} is ready", "See kubectl get nodes")
    else:
        kinds = sorted({n.metadata.labels.get("kubernetes.io/arch", "?") for n in ready})
        yield Finding("nodes", "ok", f"{len(ready)} ready, {', '.join(kinds)}")
    found = sorted(
        {name for n in ready for name, count in (n.status.allocatable or {}).items() if _counts(name, count)}
    )
    if found:
        yield Finding("accelerators", "ok", ", ".join(found))
    else:
        yield Finding("accelerators", "absent", "no node has one", "Leave GPUs out of aggregator.tiers")


def _counts(name: str, count: str) -> bool:
    return name.startswith(_ACCELERATORS) and count != "0"
