"""The operator with kopf, against an API server and a real coordinator: resources start, show and end things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import kopf
import pytest
import yaml

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.operator import resources
from fedtide.console.operator.handlers import handlers, settings
from fedtide.console.operator.resources import GROUP, ROLLOUTS, RUNS, TRIGGERS, VERSION
from fedtide.fabric.flower.app_files import bundle
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.messages.views import RUN_ENDED
from tests.cluster.api_server import ApiServer, Object
from tests.conftest import APPS
from tests.integration.installation import Installation

KINDS = {RUNS: "FederatedRun", ROLLOUTS: "ModelRollout", TRIGGERS: "TriggerRule"}


@asynccontextmanager
async def operating(server: ApiServer, client: Client) -> AsyncIterator[None]:
    server.custom = [(GROUP, VERSION, plural, kind) for plural, kind in KINDS.items()]
    registry = handlers(client)
    stop = asyncio.Event()
    running = asyncio.create_task(
        kopf.operator(
            registry=registry,
            settings=settings(),
            namespaces=["fl"],
            standalone=True,
            stop_flag=stop,
            liveness_endpoint=None,
        )
    )
    try:
        yield
    finally:
        stop.set()
        server.cut()
        async with asyncio.timeout(20):
            await running


def kubeconfig(server: ApiServer, folder: Path) -> Path:
    """What the operator finds outside a cluster."""
    file = folder / "kubeconfig"
    file.write_text(
        yaml.safe_dump(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": server.url}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
            }
        )
    )
    return file


def resource(plural: str, name: str, spec: Object) -> Object:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KINDS[plural],
        "metadata": {"name": name, "namespace": "fl", "generation": 1},
        "spec": spec,
    }


async def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 40
    while not holds():  # what serves HTTP in a thread sets no event of ours
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


def _status(server: ApiServer, plural: str, name: str) -> Object:
    status: Object = server.one(plural, name).get("status", {})
    return status


async def test_resources_start_show_and_end_what_they_stand_for(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = installation.client
    packed = bundle(APPS / "mean")
    ref = await asyncio.to_thread(client.send, endpoints.put_bundle(packed))
    app = {"name": describe(APPS / "mean").name, "bundle": {"digest": ref.digest, "sizeBytes": ref.size_bytes}}
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(server, tmp_path)))
        async with operating(server, client):
            server.put(RUNS, resource(RUNS, "good", {"app": app}))
            server.put(RUNS, resource(RUNS, "bad", {"app": app, "selector": {"region": "mars"}}))
            rule = {"on": "com.example.x", "do": {"kind": "round", "model": "digits"}, "cooldownS": 5}
            server.put(TRIGGERS, resource(TRIGGERS, "a-rule", rule))
            await _until(lambda: _status(server, RUNS, "good").get("phase") == "Completed", "the run")
            shown = _status(server, RUNS, "good")
            assert shown["round"] == 2
            assert {c["type"] for c in shown["conditions"] if c["status"] == "True"} == {"Complete"}
            await _until(lambda: _status(server, RUNS, "bad").get("phase") == "Refused", "the refusal")
            assert "no region 'mars'" in _status(server, RUNS, "bad")["message"]
            await _until(lambda: _status(server, TRIGGERS, "a-rule").get("phase") == "Applied", "the rule")
            assert (await asyncio.to_thread(client.send, endpoints.trigger("a-rule"))).rule.cooldown_s == 5

            hanging = {"app": app, "selector": {"region": "eu"}, "runConfig": {}}
            server.put(RUNS, resource(RUNS, "endless", hanging))
            await _until(lambda: "run" in _status(server, RUNS, "endless"), "the third run")
            run = _status(server, RUNS, "endless")["run"]
            for plural, name in ((RUNS, "endless"), (RUNS, "good"), (TRIGGERS, "a-rule")):
                server.answer("DELETE", f"/apis/{GROUP}/{VERSION}/namespaces/fl/{plural}/{name}", {}, None)
            await _until(lambda: server.names(RUNS) == ["bad"] and not server.names(TRIGGERS), "the finalizers")
            assert installation.show(run).state in RUN_ENDED
            assert "a-rule" not in [t.trigger for t in client.every(endpoints.triggers())]


def test_a_spec_becomes_a_request_and_keys_of_the_user_stay_as_they_are() -> None:
    spec = {"runConfig": {"learningRate": 0.1}, "selection": {"overProvision": 1.5}, "policy": {"minUpdates": 2}}
    assert resources.request(spec) == {
        "run_config": {"learningRate": 0.1},
        "selection": {"over_provision": 1.5},
        "policy": {"min_updates": 2},
    }
