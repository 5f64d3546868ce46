"""Helm itself installs, upgrades, rolls back, tests and uninstalls both charts on an API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from tests.cluster.api_server import Object
from tests.cluster.helm_server import HelmServer
from tests.cluster.test_charts import CLOUD, EDGE

READY: Any = {"wait": "watcher", "timeout": 30}
APPLIED: Any = {"wait": "hookOnly", "timeout": 30}


@pytest.fixture
def server() -> Iterator[HelmServer]:
    with HelmServer() as started:
        yield started


def images(server: HelmServer, plural: str) -> set[str]:
    bodies = [body for key, body in server.objects.items() if key[0] == plural]
    return {c["image"].rpartition(":")[2] for b in bodies for c in b["spec"]["template"]["spec"]["containers"]}


@pytest.mark.parametrize(
    ("file", "workload", "kept"),
    [
        pytest.param(
            CLOUD / "examples/one-machine.yaml",
            "deployments",
            {"customresourcedefinitions", "namespaces"},
            marks=pytest.mark.slow,
            id="cloud",
        ),
        pytest.param(EDGE / "examples/shops.yaml", "daemonsets", {"namespaces"}, id="edge"),
    ],
)
def test_a_release_is_installed_upgraded_rolled_back_and_leaves_only_what_it_must_keep(
    server: HelmServer, file: Path, workload: str, kept: set[str]
) -> None:
    values: Object = yaml.safe_load(file.read_text())
    cluster = helm.Config(kubeconfig_content=server.kubeconfig(), namespace="fl")
    with helm.Chart.load(str(file.parents[1])) as chart:
        cluster.install(chart, "ft", values, create_namespace=True, **READY)
        before = images(server, workload)
        cluster.upgrade(chart, "ft", {**values, "image": {"tag": "9.9.9"}}, **APPLIED)
        assert images(server, workload) == {"9.9.9"}
        cluster.rollback("ft", version=1, **APPLIED)
        assert images(server, workload) == before
        cluster.uninstall("ft", **APPLIED)
    assert {plural for plural, _, _ in server.objects} == kept


def test_the_release_tests_itself_and_refuses_to_lose_its_streams(server: HelmServer) -> None:
    values: Object = yaml.safe_load((CLOUD / "examples/one-machine.yaml").read_text())
    cluster = helm.Config(kubeconfig_content=server.kubeconfig(), namespace="fl")
    with helm.Chart.load(str(CLOUD)) as chart:
        cluster.install(chart, "ft", values, create_namespace=True, **APPLIED)
        cluster.test("ft", timeout=20)
        assert any(method == "PATCH" and "/pods/ft-" in path for method, path, *_ in server.requests)
        with pytest.raises(helm.HelmError, match=r"nats\.replicas"):
            cluster.upgrade(chart, "ft", {**values, "nats": {**values["nats"], "replicas": 3}}, **APPLIED)
        larger = {**values["nats"], "storage": {**values["nats"].get("storage", {}), "size": "77Gi"}}
        with pytest.raises(helm.HelmError, match=r"fedtide k8s grow 77Gi"):
            cluster.upgrade(chart, "ft", {**values, "nats": larger}, **APPLIED)


@pytest.mark.slow
def test_a_second_release_in_the_namespace_leaves_the_custom_resources_to_the_first(server: HelmServer) -> None:
    values: Object = yaml.safe_load((CLOUD / "examples/one-machine.yaml").read_text())
    cluster = helm.Config(kubeconfig_content=server.kubeconfig(), namespace="fl")
    with helm.Chart.load(str(CLOUD)) as chart:
        cluster.install(chart, "first", values, create_namespace=True, **APPLIED)
        with pytest.raises(helm.HelmError, match=r"operator of release first serves.*operator\.enabled=false"):
            cluster.install(chart, "second", values, **APPLIED)
        cluster.install(chart, "second", {**values, "operator": {"enabled": False}}, **APPLIED)
        cluster.upgrade(chart, "first", values, **APPLIED)
