"""What a person who helps needs to see of an installation in a cluster, in one archive, and nothing secret.

Of Secrets there are the names of their keys only; passwords in URLs and tokens in what is shown are crossed out.
"""

from __future__ import annotations

import io
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from fedtide.fabric.errors import TransientError

LOG_LINES = 5000
_CROSSED_OUT = "***"
_SECRET = re.compile(
    r"(?P<url>(?<=://)[^/@\s:]*:[^/@\s]*(?=@))|(?P<jwt>eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)|(?P<seed>\bS[ACOUNX][A-Z2-7]{50,})"
    r"|(?P<bearer>(?<=[Bb]earer )[\w.~+/=-]{8,})"
)
"""Passwords in URLs (RFC 3986), JWTs (RFC 7519), seeds of NATS keys, bearer tokens (RFC 6750)."""


def save(api: client.ApiClient, namespace: str, file: Path) -> list[str]:
    """Write the archive; returns the names of what it holds.

    Raises:
        TransientError: the API server does not answer.
    """
    names = []
    with tarfile.open(file, "w:gz") as archive:
        for name, text in collected(api, namespace):
            data = crossed_out(text).encode()
            entry = tarfile.TarInfo(f"fedtide-{namespace}/{name}")
            entry.size, entry.mtime = len(data), int(time.time())
            archive.addfile(entry, io.BytesIO(data))
            names.append(name)
    return names


def crossed_out(text: str) -> str:
    """The same without what opens a door."""
    return _SECRET.sub(_CROSSED_OUT, text)


def collected(api: client.ApiClient, namespace: str) -> Iterator[tuple[str, str]]:
    """Names and texts: objects as YAML, logs of every container, those of its last life too."""
    core, apps, batch = client.CoreV1Api(api), client.AppsV1Api(api), client.BatchV1Api(api)
    listings: dict[str, Callable[[], Any]] = {
        "pods": lambda: core.list_namespaced_pod(namespace),
        "events": lambda: core.list_namespaced_event(namespace),
        "services": lambda: core.list_namespaced_service(namespace),
        "configmaps": lambda: core.list_namespaced_config_map(namespace),
        "volumes": lambda: core.list_namespaced_persistent_volume_claim(namespace),
        "deployments": lambda: apps.list_namespaced_deployment(namespace),
        "statefulsets": lambda: apps.list_namespaced_stateful_set(namespace),
        "daemonsets": lambda: apps.list_namespaced_daemon_set(namespace),
        "jobs": lambda: batch.list_namespaced_job(namespace),
        "policies": lambda: client.NetworkingV1Api(api).list_namespaced_network_policy(namespace),
    }
    pods: list[Any] = []
    for name, listing in listings.items():
        found = _asked(listing)
        if isinstance(found, str):
            yield f"{name}.txt", found
            continue
        pods = found.items if name == "pods" else pods
        yield f"{name}.yaml", _yaml(api, found)
    yield "secrets.yaml", _secrets(core, namespace)
    for pod in pods:
        for container in [*(pod.spec.init_containers or []), *pod.spec.containers]:
            for previous in (False, True):
                text = _log(core, namespace, pod.metadata.name, container.name, previous=previous)
                if text:
                    yield f"logs/{pod.metadata.name}/{container.name}{'.previous' if previous else ''}.log", text


def _asked(ask: Callable[[], Any]) -> Any:
    """The answer, or why there is none: a right that is missing must not end the rest."""
    try:
        return ask()
    except ApiException as exc:
        return f"{exc.status} {exc.reason}"
    except HTTPError as exc:
        raise TransientError(f"the Kubernetes API does not answer: {exc}", "See `kubectl cluster-info`") from exc


def _yaml(api: client.ApiClient, found: Any) -> str:
    return yaml.safe_dump_all(api.sanitize_for_serialization(found.items), sort_keys=False)


def _secrets(core: client.CoreV1Api, namespace: str) -> str:
    found = _asked(lambda: core.list_namespaced_secret(namespace))
    if isinstance(found, str):
        return found
    return yaml.safe_dump({s.metadata.name: sorted(s.data or {}) for s in found.items})


def _log(core: client.CoreV1Api, namespace: str, pod: str, container: str, *, previous: bool) -> str:
    found = _asked(
        lambda: core.read_namespaced_pod_log(
            pod, namespace, container=container, previous=previous, tail_lines=LOG_LINES, timestamps=True
        )
    )
    return "" if previous and re.match(r"4\d\d ", found or "") else found or ""
