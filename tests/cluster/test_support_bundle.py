"""`fedtide k8s bundle`: what helps is there, what opens a door is not."""

from __future__ import annotations

import base64
import tarfile
from pathlib import Path

import pytest
from kubernetes import client

from fedtide.console.cli.support_bundle import crossed_out, save
from tests.cluster.api_server import ApiServer, Object, Refusal

SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
JWT = "eyJ0eXAiOiJKV1QiLCJhbGciOiJlZDI1NTE5In0.eyJqdGkiOiJ4In0.c2lnbmF0dXJl"


def _text(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as opened:
        members = [m for m in opened.getmembers() if m.isfile()]
        return {m.name.partition("/")[2]: opened.extractfile(m).read().decode() for m in members}


def test_objects_and_logs_are_in_it_and_secrets_are_not(tmp_path: Path) -> None:
    with ApiServer() as server:
        api = client.ApiClient(client.Configuration(host=server.url))
        pod: Object = {"metadata": {"name": "hub-0", "namespace": "fl"}, "spec": {"containers": [{"name": "nats"}]}}
        server.put("pods", pod)
        server.answers["/api/v1/namespaces/fl/pods/hub-0/log"] = {"line": f"Authorization: Bearer abcdefgh12345 {SEED}"}
        config = {"coordinator.json": '{"index": "https://me:pass-word@pypi.example/simple"}'}
        server.put("configmaps", {"metadata": {"name": "c", "namespace": "fl"}, "data": config})
        token = base64.b64encode(b"top secret").decode()
        server.put("secrets", {"metadata": {"name": "identity", "namespace": "fl"}, "data": {"api-token": token}})
        server.fault(lambda method, path: path.endswith("/daemonsets"), Refusal(403, "Forbidden"))
        names = save(api, "fl", tmp_path / "b.tar.gz")
    found = _text(tmp_path / "b.tar.gz")
    assert set(names) == set(found)
    assert "hub-0" in found["pods.yaml"] and "pypi.example" in found["configmaps.yaml"]
    assert "identity" in found["secrets.yaml"] and "api-token" in found["secrets.yaml"]
    assert found["daemonsets.txt"] == "403 Forbidden"
    assert any(name.startswith("logs/hub-0/nats") for name in found)
    everything = "".join(found.values())
    for secret in ("pass-word", token, "top secret", SEED, "abcdefgh12345"):
        assert secret not in everything


@pytest.mark.parametrize(
    "text", [f"creds {JWT} end", f"seed={SEED}", "nats://user:p%40ss@hub:4222", "Bearer a.b-c_d~e+f/g="]
)
def test_whatever_opens_a_door_is_crossed_out(text: str) -> None:
    shown = crossed_out(text)
    assert "***" in shown and JWT not in shown and SEED not in shown and "p%40ss" not in shown and "a.b-c" not in shown


def test_what_opens_none_stays() -> None:
    text = "image sha256:abc https://a.example/x?y=1 SUBJECT nats://hub:4222 key=value bearer of news"
    assert crossed_out(text) == text
