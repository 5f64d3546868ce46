"""`fedtide k8s grow` against an API server: claims ask for more, the StatefulSet goes and its pods stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubernetes import client

from fedtide.console.cli.volume_growth import grow
from fedtide.fabric.errors import ConfigError, NotFound
from tests.cluster.api_server import ApiServer, Object

CLAIMS, CLASSES, SETS = "persistentvolumeclaims", "storageclasses", "statefulsets"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as there:
        yield there


def _installed(server: ApiServer, *, grows: bool) -> client.ApiClient:
    server.put(CLASSES, {"metadata": {"name": "disk"}, "provisioner": "x", "allowVolumeExpansion": grows})
    for name in ("data-ft-nats-0", "data-ft-nats-1", "data-other-nats-0", "data-ft-nats-old"):
        spec: Object = {"storageClassName": "disk", "resources": {"requests": {"storage": "10Gi"}}}
        server.put(CLAIMS, {"metadata": {"name": name, "namespace": "fl"}, "spec": spec})
    spec = {"serviceName": "ft", "selector": {}, "template": {"metadata": {}}}
    server.put(SETS, {"metadata": {"name": "ft-nats", "namespace": "fl"}, "spec": spec})
    return client.ApiClient(client.Configuration(host=server.url))


def _sizes(server: ApiServer) -> dict[str, str]:
    return {n: server.one(CLAIMS, n)["spec"]["resources"]["requests"]["storage"] for n in server.names(CLAIMS)}


def test_volumes_grow_and_the_next_upgrade_makes_the_servers_anew(server: ApiServer) -> None:
    api = _installed(server, grows=True)
    said = list(grow(api, "fl", "ft-nats", "20Gi"))
    assert len(said) == 3 and "data-ft-nats-0: 10Gi -> 20Gi" in said[0]
    assert _sizes(server) == {
        "data-ft-nats-0": "20Gi",
        "data-ft-nats-1": "20Gi",
        "data-ft-nats-old": "10Gi",
        "data-other-nats-0": "10Gi",
    }
    assert server.names(SETS) == []
    (deleted,) = [query for method, path, query, _ in server.requests if method == "DELETE" and SETS in path]
    assert deleted["propagationPolicy"] == "Orphan"
    assert list(grow(api, "fl", "ft-nats", "20Gi")) == []  # again: nothing is left to do


@pytest.mark.parametrize(
    ("grows", "size", "servers", "error"),
    [
        (False, "20Gi", "ft-nats", (ConfigError, "cannot grow")),
        (True, "5Gi", "ft-nats", (ConfigError, "does not shrink")),
        (True, "much", "ft-nats", (ConfigError, "is no size")),
        (True, "20Gi", "fx-nats", (NotFound, "no volumes")),
    ],
)
def test_what_cannot_be_is_said_before_anything_changes(
    server: ApiServer, grows: bool, size: str, servers: str, error: tuple[type[Exception], str]
) -> None:
    api = _installed(server, grows=grows)
    with pytest.raises(error[0], match=error[1]):
        list(grow(api, "fl", servers, size))
    assert set(_sizes(server).values()) == {"10Gi"} and server.names(SETS) == ["ft-nats"]
