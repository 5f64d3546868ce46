"""`fedtide k8s uninstall`: what stays is named, and removed only if that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtide.console.cli.__main__ import main
from tests.cluster.api_server import ApiServer, Object
from tests.cluster.helm_server import HelmServer

GROUP = ("fedtide.dev", "v1alpha1")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as there:
        there.custom = [(*GROUP, "federatedmodels", "FederatedModel")]
        for plural, name in (
            ("secrets", "ft-identity"),
            ("secrets", "ft-servers"),
            ("secrets", "somebody-elses"),
            ("configmaps", "ft-log"),
            ("federatedmodels", "digits"),
        ):
            there.put(plural, {"metadata": {"name": name, "namespace": "fl"}})
        for name, release in (("data-ft-nats-0", "ft"), ("data-other-nats-0", "other")):
            labels: Object = {"app.kubernetes.io/instance": release}
            there.put("persistentvolumeclaims", {"metadata": {"name": name, "namespace": "fl", "labels": labels}})
        (tmp_path / "kubeconfig").write_text(HelmServer.kubeconfig(there))
        helm = tmp_path / "helm"
        helm.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')  # it has removed the release already
        helm.chmod(0o755)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        yield there


def _uninstall(monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    command = ["fedtide", "k8s", "uninstall", "cloud", "-n", "fl", "--name", "ft", *more]
    monkeypatch.setattr("sys.argv", command)
    return main()


def _names(server: ApiServer) -> set[str]:
    return {name for _, _, name in server.objects}


def test_what_stays_is_named_and_stays(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _names(server)
    assert _uninstall(monkeypatch) == 0
    assert (tmp_path / "called").read_text().startswith("uninstall ft -n fl")
    shown = capsys.readouterr().out
    for name in ("ft-identity", "ft-servers", "ft-log", "data-ft-nats-0", "federatedmodels digits"):
        assert name in shown
    assert "somebody" not in shown and "other" not in shown and _names(server) == before


def test_a_purge_removes_what_belongs_to_the_release_and_nothing_else(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _uninstall(monkeypatch, "--purge", "--yes") == 0
    assert _names(server) == {"somebody-elses", "data-other-nats-0"}
    assert _uninstall(monkeypatch, "--purge") == 0, "nothing is left to be asked about"


def test_what_another_releases_operator_serves_stays(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: Object = {"app.kubernetes.io/part-of": "fedtide", "app.kubernetes.io/component": "operator"}
    server.put("pods", {"metadata": {"name": "other-operator", "namespace": "fl", "labels": labels}})
    assert _uninstall(monkeypatch, "--purge", "--yes") == 0
    assert "digits" in _names(server) and "ft-identity" not in _names(server)


def test_of_a_region_the_secrets_go_that_it_was_given(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("of-this-region", "fedtide-join"):
        server.put("secrets", {"metadata": {"name": name, "namespace": "fl"}})
    values = json.dumps({"credentialsSecret": "of-this-region", "joinTokenSecret": "used-up"})
    (tmp_path / "helm").write_text(f"#!/bin/sh\n[ \"$1\" = get ] && echo '{values}'\nexit 0\n")
    monkeypatch.setattr("sys.argv", ["fedtide", "k8s", "uninstall", "edge", "-n", "fl", "--purge", "--yes"])
    assert main() == 0
    assert "of-this-region" not in _names(server) and {"fedtide-join", "ft-identity"} <= _names(server)


def test_without_a_yes_nothing_is_removed(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.dumps(sorted(_names(server)))
    assert _uninstall(monkeypatch, "--purge") != 0
    assert json.dumps(sorted(_names(server))) == before
