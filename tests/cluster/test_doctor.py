"""`fedtide k8s`: what the doctor finds in clusters, and what is said without Helm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from fedtide.console.cli.cluster_doctor import examine
from fedtide.fabric.errors import TransientError
from tests.cluster.api_server import ApiServer, Refusal


def _cluster(server: ApiServer, *, minor: str, storage: bool, gpus: str, allowed: bool = True) -> dict[str, str]:
    server.answers = {
        "/version/": _code(minor),
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews": {"spec": {}, "status": {"allowed": allowed}},
    }
    server.custom = [("keda.sh", "v1", "scaledobjects", "ScaledObject")]
    default = {"storageclass.kubernetes.io/is-default-class": "true"} if storage else {}
    server.put("storageclasses", {"metadata": {"name": "local-path", "annotations": default}, "provisioner": "p"})
    conditions = [{"type": "Ready", "status": "True"}]
    status = {"conditions": conditions, "allocatable": {"cpu": "4", "nvidia.com/gpu": gpus}}
    server.put("nodes", {"metadata": {"name": "n1", "labels": {"kubernetes.io/arch": "arm64"}}, "status": status})
    api = client.ApiClient(client.Configuration(host=server.url))
    return {f.what: f.outcome for f in examine(api, "fl")}


def _code(minor: str) -> dict[str, Any]:
    other = ("buildDate", "compiler", "gitCommit", "gitTreeState", "gitVersion", "goVersion", "platform")
    return {"major": "1", "minor": minor, **dict.fromkeys(other, "x")}


def test_a_good_cluster_lacks_only_what_is_optional() -> None:
    with ApiServer() as server:
        found = _cluster(server, minor="33+", storage=True, gpus="2")
    assert found == {
        "Kubernetes": "ok",
        "your rights": "ok",
        "storage": "ok",
        "nodes": "ok",
        "accelerators": "ok",
        "kueue.x-k8s.io": "absent",
        "keda.sh": "ok",
        "cert-manager.io": "absent",
        "monitoring.coreos.com": "absent",
    }


def test_what_is_needed_and_not_there_is_missing() -> None:
    with ApiServer() as server:
        found = _cluster(server, minor="27", storage=False, gpus="0", allowed=False)
    assert {w for w, outcome in found.items() if outcome == "missing"} == {"Kubernetes", "your rights", "storage"}
    assert found["accelerators"] == "absent"


def test_a_server_that_lets_nobody_look_is_said_so() -> None:
    with ApiServer() as server:
        server.fault(lambda *_: True, Refusal(401, "Unauthorized"))
        with pytest.raises(TransientError, match="401 Unauthorized"):
            list(examine(client.ApiClient(client.Configuration(host=server.url)), "fl"))


def test_without_helm_or_chart_the_remedy_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedtide.console.cli", "k8s", "install", "cloud"]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    here = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert (here.returncode, "Install Helm" in here.stderr) == (69, True)
    there = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (there.returncode, "there is no chart at" in there.stderr) == (2, True)


def test_helm_is_called_with_what_was_asked(tmp_path: Path) -> None:
    told = tmp_path / "told"
    helm = tmp_path / "helm"
    helm.write_text(f'#!{sys.executable}\nimport json, sys\nopen("{told}", "w").write(json.dumps(sys.argv[1:]))\n')
    helm.chmod(0o755)
    (tmp_path / "chart").mkdir()
    command = [
        sys.executable,
        "-m",
        "fedtide.console.cli",
        "k8s",
        "install",
        "edge",
        "--chart",
        str(tmp_path / "chart"),
    ]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, "--set", "region=eu", "-f", "v.yaml"], env=environment, check=True)
    chart = str(tmp_path / "chart")
    wanted = ["upgrade", "--install", "fedtide-edge", chart, "-n", "fedtide", "--create-namespace"]
    assert json.loads(told.read_text())[:7] == wanted
    assert json.loads(told.read_text())[7:11] == ["-f", "v.yaml", "--set", "region=eu"]
