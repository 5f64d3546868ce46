"""What a Helm release leaves behind when it is uninstalled: what must not be lost by mistake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from fedtide.fabric.errors import TransientError

GROUP, VERSION = "fedtide.dev", "v1alpha1"


@dataclass(frozen=True, slots=True)
class Remain:
    """An object in the release's namespace, and what goes with it."""

    kind: str
    name: str
    what: str


def of_cloud(api: client.ApiClient, namespace: str, release: str) -> list[Remain]:
    """Raises TransientError: the API server refuses, or is not there."""
    named = [
        Remain("secret", f"{release}-identity", "the authority: without it every node must enrol again"),
        Remain("secret", f"{release}-release-authority", "the key that vouches for releases"),
        Remain("secret", f"{release}-trust-offline", "the keys of root and publisher, unless they were taken away"),
        Remain("secret", f"{release}-servers", "certificates, and the key of what servers store"),
        Remain("configmap", f"{release}-log", "which log the hub had"),
    ]
    found = [*_there(api, namespace, named), *_volumes(api, namespace, release, "log, releases and runs")]
    return [*found, *_custom(api, namespace)]


def of_edge(api: client.ApiClient, namespace: str, release: str, secrets: Sequence[str]) -> list[Remain]:
    """As `of_cloud`; what agents keep on their machines is not seen.

    Args:
        secrets: those that the release was given.
    """
    named = [Remain("secret", each, "what this region was given by `fedtide fleet`") for each in secrets]
    return [*_there(api, namespace, named), *_volumes(api, namespace, release, "what the region's leaf caches")]


def remove(api: client.ApiClient, namespace: str, remain: Remain) -> None:
    """Delete one; one that is gone already is fine.

    Raises:
        TransientError: as above.
    """
    core, custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
    match remain.kind:
        case "secret":
            _call(core.delete_namespaced_secret, remain.name, namespace)
        case "configmap":
            _call(core.delete_namespaced_config_map, remain.name, namespace)
        case "persistentvolumeclaim":
            _call(core.delete_namespaced_persistent_volume_claim, remain.name, namespace)
        case kind:
            _call(custom.delete_namespaced_custom_object, GROUP, VERSION, namespace, kind, remain.name)


def _there(api: client.ApiClient, namespace: str, named: list[Remain]) -> Iterator[Remain]:
    core = client.CoreV1Api(api)
    read = {"secret": core.read_namespaced_secret, "configmap": core.read_namespaced_config_map}
    return (each for each in named if _call(read[each.kind], each.name, namespace) is not None)


def _volumes(api: client.ApiClient, namespace: str, release: str, what: str) -> Iterator[Remain]:
    listing = client.CoreV1Api(api).list_namespaced_persistent_volume_claim
    found = _call(listing, namespace, label_selector=f"app.kubernetes.io/instance={release}")
    for each in found.items if found is not None else ():
        yield Remain("persistentvolumeclaim", each.metadata.name, what)


def _custom(api: client.ApiClient, namespace: str) -> Iterator[Remain]:
    """The resources of our kinds, which belong to no release; while another one's operator serves them they are its."""
    label = "app.kubernetes.io/part-of=fedtide,app.kubernetes.io/component=operator"
    pods = _call(client.CoreV1Api(api).list_namespaced_pod, namespace, label_selector=label)
    if pods is not None and any(each.metadata.deletion_timestamp is None for each in pods.items):
        return
    custom = client.CustomObjectsApi(api)
    served = _call(custom.get_api_resources, GROUP, VERSION)
    kinds = [each.name for each in served.resources if "/" not in each.name] if served is not None else []
    for plural in kinds:
        found = _call(custom.list_namespaced_custom_object, GROUP, VERSION, namespace, plural)
        for each in found["items"] if found is not None else ():
            yield Remain(plural, each["metadata"]["name"], "a custom resource")


def _call(function: Any, *arguments: Any, **more: Any) -> Any:
    """None: it is not there."""
    try:
        return function(*arguments, **more)
    except ApiException as exc:
        if exc.status == HTTPStatus.NOT_FOUND:
            return None
        raise TransientError(f"the Kubernetes API says {exc.status}: {exc.reason}", "See who you are there") from exc
    except HTTPError as exc:
        raise TransientError(f"the Kubernetes API does not answer: {exc}") from exc
