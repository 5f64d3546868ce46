"""The operator as it is shipped, against an API server and a real coordinator: resources start, show and end things."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kopf
import pytest

from fedtide.console import endpoints
from fedtide.console.cli.try_command import LINE
from fedtide.console.client import AsyncClient
from fedtide.console.home import Home
from fedtide.console.operator import following, resources
from fedtide.console.operator.__main__ import health_endpoint
from fedtide.console.operator.news import News
from fedtide.console.operator.resources import GROUP, MODELS, ROLLOUTS, RUNS, TRIGGERS, VERSION
from fedtide.console.publishing import signed
from fedtide.console.servers import Servers
from fedtide.fabric.flower.app_files import bundle
from fedtide.fabric.messages.views import RUN_ENDED
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.trust.installation import PUBLISHER_KEY
from tests.cluster.api_server import ApiServer, Object
from tests.conftest import APPS
from tests.integration.installation import Installation, until
from tests.integration.releases import release

KINDS = {RUNS: "FederatedRun", ROLLOUTS: "ModelRollout", TRIGGERS: "TriggerRule", MODELS: "FederatedModel"}


@contextmanager
def operating(server: ApiServer, there: Installation, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The operator as the chart starts it, its resources served by `server`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    environment |= {
        "KUBECONFIG": str(server.kubeconfig_in(folder)),
        "FEDTIDE_SERVER": there.state["apis"][0],
        "FEDTIDE_TOKEN": Home(there.home).api_token_file.read_text(),
        "POD_IP": "127.0.0.1",
    }
    command = [sys.executable, "-m", "fedtide.console.operator", "--namespace", "fl"]
    with (folder / "operator.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        server.cut()
        process.wait(30)


def serve(server: ApiServer) -> None:
    server.custom = [(GROUP, VERSION, plural, kind) for plural, kind in KINDS.items()]


def resource(plural: str, name: str, spec: Object) -> Object:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KINDS[plural],
        "metadata": {"name": name, "namespace": "fl", "generation": 1},
        "spec": spec,
    }


def _status(server: ApiServer, plural: str, name: str) -> Object:
    status: Object = server.one(plural, name).get("status", {})
    return status


def _until_phase(server: ApiServer, plural: str, name: str, phase: str) -> Object:
    until(lambda: _status(server, plural, name).get("phase") in (phase, "Refused"), f"{name} {phase}")
    assert _status(server, plural, name)["phase"] == phase, _status(server, plural, name)
    return _status(server, plural, name)


def _edit(server: ApiServer, plural: str, name: str, **spec: object) -> int:
    """As `kubectl apply` of a changed spec, which leaves what the operator writes meanwhile; returns its generation."""
    generation: int = server.one(plural, name)["metadata"]["generation"] + 1
    path = f"/apis/{GROUP}/{VERSION}/namespaces/fl/{plural}/{name}"
    server.answer("PATCH", path, {}, {"spec": spec, "metadata": {"generation": generation}})
    return generation


def _delete(server: ApiServer, plural: str, name: str) -> None:
    server.answer("DELETE", f"/apis/{GROUP}/{VERSION}/namespaces/fl/{plural}/{name}", {}, None)


def _condition(status: Object, kind: str) -> str:
    return next((c["status"] for c in status.get("conditions", []) if c["type"] == kind), "")


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with ApiServer() as there:
        yield there


@pytest.fixture(scope="module")
def operated(
    installation: Installation, server: ApiServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Started before its kinds are there, as after a `helm install` whose kinds come later."""
    folder = tmp_path_factory.mktemp("operator")
    with operating(server, installation, folder) as process:
        until(lambda: "operator.waits" in (folder / "operator.log").read_text(), "that it waits")
        assert process.poll() is None
        serve(server)
        yield installation


def _app(there: Installation, folder: Path = APPS / "mean") -> Object:
    ref = there.client.send(endpoints.put_bundle(bundle(folder)))
    key = str(Home(there.home).trust / PUBLISHER_KEY)
    app = signed(AppRef(name=folder.name, bundle=ref), key)
    return {
        "name": folder.name,
        "bundle": {"digest": ref.digest, "sizeBytes": ref.size_bytes},
        "signatures": app.signatures,
    }


@pytest.mark.slow
def test_resources_start_show_and_end_what_they_stand_for(operated: Installation, server: ApiServer) -> None:
    app = _app(operated)
    server.put(RUNS, resource(RUNS, "good", {"app": app}))
    server.put(RUNS, resource(RUNS, "bad", {"app": app, "selector": {"region": "mars"}}))
    rule = {"on": "com.example.x", "do": {"kind": "round", "model": "digits"}, "cooldownS": 5}
    server.put(TRIGGERS, resource(TRIGGERS, "a-rule", rule))
    shown = _until_phase(server, RUNS, "good", "Completed")
    assert shown["round"] == 2
    assert {c["type"] for c in shown["conditions"] if c["status"] == "True"} == {"Complete"}
    assert "no region 'mars'" in _until_phase(server, RUNS, "bad", "Refused")["message"]
    _until_phase(server, TRIGGERS, "a-rule", "Applied")
    assert operated.client.send(endpoints.trigger("a-rule")).rule.cooldown_s == 5
    # What has ended needs nobody to be deleted.
    until(lambda: not server.one(RUNS, "good")["metadata"].get("finalizers"), "no finalizer")

    server.put(RUNS, resource(RUNS, "endless", {"app": app, "selector": {"region": "eu"}, "runConfig": {}}))
    until(lambda: "run" in _status(server, RUNS, "endless"), "the third run")
    run = _status(server, RUNS, "endless")["run"]
    for plural, name in ((RUNS, "endless"), (RUNS, "good"), (TRIGGERS, "a-rule")):
        _delete(server, plural, name)
    until(lambda: server.names(RUNS) == ["bad"] and not server.names(TRIGGERS), "the end of the resources")
    assert operated.show(run).state in RUN_ENDED
    assert "a-rule" not in [t.trigger for t in operated.client.every(endpoints.triggers())]


def test_a_rule_whose_change_was_refused_is_in_force_until_it_is_deleted(
    operated: Installation, server: ApiServer
) -> None:
    rule = {"on": "com.example.y", "do": {"kind": "round", "model": "digits"}}
    server.put(TRIGGERS, resource(TRIGGERS, "stays", rule))
    _until_phase(server, TRIGGERS, "stays", "Applied")
    _edit(server, TRIGGERS, "stays", where="((")
    status = _until_phase(server, TRIGGERS, "stays", "Refused")
    assert "generation 1 is still in force" in status["message"] and _condition(status, "Accepted") == "False"
    assert operated.client.send(endpoints.trigger("stays")).rule.where == ""
    _delete(server, TRIGGERS, "stays")
    until(lambda: "stays" not in server.names(TRIGGERS), "its end")
    assert "stays" not in [t.trigger for t in operated.client.every(endpoints.triggers())]


def test_a_rollout_that_is_paused_from_the_beginning_begins_when_it_is_let_go_and_keeps_its_plan(
    operated: Installation, server: ApiServer
) -> None:
    version = release(operated, 2.0)
    before = {r.rollout for r in operated.rollouts()}
    server.put(ROLLOUTS, resource(ROLLOUTS, "held", {"model": "scale", "version": version, "paused": True}))
    assert "spec.paused" in _until_phase(server, ROLLOUTS, "held", "Paused")["message"]
    assert {r.rollout for r in operated.rollouts()} == before
    _edit(server, ROLLOUTS, "held", paused=False, bake={"seconds": 3600.0})
    _until_phase(server, ROLLOUTS, "held", "Rolling")
    key = _status(server, ROLLOUTS, "held")["rollout"]
    seen = _status(server, ROLLOUTS, "held")["observedGeneration"]

    _edit(server, ROLLOUTS, "held", canary=0.9)
    until(lambda: _condition(_status(server, ROLLOUTS, "held"), "Accepted") == "False", "the word on the change")
    assert _status(server, ROLLOUTS, "held")["observedGeneration"] == seen
    generation = _edit(server, ROLLOUTS, "held", paused=True)  # of the changed spec: pausing is taken over all the same
    until(lambda: operated.rollout(key).state == "paused", "the pause")
    assert _status(server, ROLLOUTS, "held")["observedGeneration"] < generation
    _delete(server, ROLLOUTS, "held")
    until(lambda: "held" not in server.names(ROLLOUTS), "its end")


def test_a_model_trains_is_rolled_out_when_it_is_better_and_says_where_it_is(
    operated: Installation, server: ApiServer
) -> None:
    spec: Object = {
        "train": {"app": _app(operated, LINE), "rounds": 1},
        "triggers": [{"name": "more", "on": "com.example.more", "cooldownS": 0}],
        "rollOut": {"better": {"metric": "accuracy"}, "plan": {"canary": 1.0}},
    }
    server.put(MODELS, resource(MODELS, "loop", spec))
    until(lambda: _condition(_status(server, MODELS, "loop"), "Serving") == "True", "the first release on the nodes")
    status = _status(server, MODELS, "loop")
    assert (status["phase"], status["latestVersion"], status["servedVersion"]) == ("Serving", 1, 1), status
    assert {k: _condition(status, k) for k in ("Accepted", "Trained", "Training", "RolledBack")} == {
        "Accepted": "True",
        "Trained": "True",
        "Training": "False",
        "RolledBack": "False",
    }

    operated.run("trigger", "fire", "--type", "com.example.more")
    until(lambda: _status(server, MODELS, "loop")["latestVersion"] == 2, "the second release")
    first, second = operated.client.send(endpoints.model("loop")).releases
    assert second.lineage.base is not None and second.lineage.base.digest == first.digest
    until(lambda: len(operated.client.send(endpoints.trigger("loop_roll-out")).history) == 2, "the decision on it")
    is_better = (second.metrics["accuracy"] or 0) > (first.metrics["accuracy"] or 0)
    decided = operated.client.send(endpoints.trigger("loop_roll-out")).history[-1]
    assert decided.outcome == ("fired" if is_better else "condition"), decided
    until(lambda: _status(server, MODELS, "loop")["servedVersion"] == 1 + is_better, "which one serves")

    _edit(server, MODELS, "loop", rollOut={"plan": {"canary": "many"}})
    until(lambda: _condition(_status(server, MODELS, "loop"), "Accepted") == "False", "the word on the wrong edit")
    assert operated.client.send(endpoints.trigger("loop_roll-out")).rule.where
    assert "still in force" in _status(server, MODELS, "loop")["message"]
    _edit(server, MODELS, "loop", rollOut={}, paused=True)
    until(lambda: not _status(server, MODELS, "loop")["rules"], "that no rule is left")
    assert not [t for t in operated.client.every(endpoints.triggers()) if t.trigger.startswith("loop_")]
    until(lambda: _status(server, MODELS, "loop")["phase"] == "Paused", "the pause")
    _delete(server, MODELS, "loop")
    until(lambda: "loop" not in server.names(MODELS), "its end")


async def test_what_another_writes_while_it_looks_stays(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(server)
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_in(tmp_path)))
    monkeypatch.setattr(following, "RETRY_S", 0.01)
    body = resource(ROLLOUTS, "shared", {"model": "scale", "version": 1})
    body["metadata"]["namespace"] = "elsewhere"
    body["status"] = {"phase": "Rolling", "word": "old", "conditions": []}
    body = server.put(ROLLOUTS, body)
    seen: list[str] = []

    async def look(now: Mapping[str, Any]) -> following.Seen:
        seen.append(now["word"])
        if len(seen) == 1:
            server.set_status(ROLLOUTS, "shared", {"phase": "Rolling", "word": "new", "conditions": []})
        return {"phase": "Completed", "word": now["word"], "conditions": []}, frozenset()

    api = AsyncClient(Servers(("http://127.0.0.1:9",), ""))
    await following.Following(api, News(api)).follow(ROLLOUTS, kopf.Body(body), look)
    await api.close()
    assert seen == ["old", "new"] and _status(server, ROLLOUTS, "shared")["word"] == "new"


def test_what_is_left_after_an_uninstall_can_be_deleted(server: ApiServer, tmp_path: Path) -> None:
    serve(server)
    left = resource(TRIGGERS, "left", {"on": "x", "do": {"kind": "round", "model": "m"}})
    left["metadata"]["finalizers"] = ["fedtide.dev/ends-first", "example.com/other"]
    left["metadata"]["namespace"] = "elsewhere"
    server.put(TRIGGERS, left)
    command = [sys.executable, "-m", "fedtide.console.operator", "--namespace", "elsewhere", "--let-go"]
    for _ in range(2):
        subprocess.run(
            command, env={**os.environ, "KUBECONFIG": str(server.kubeconfig_in(tmp_path))}, check=True, timeout=60
        )
        assert server.one(TRIGGERS, "left")["metadata"]["finalizers"] == ["example.com/other"]


def test_a_spec_becomes_a_request_and_keys_of_the_user_stay_as_they_are() -> None:
    spec = {"runConfig": {"learningRate": 0.1}, "selection": {"overProvision": 1.5}, "policy": {"minUpdates": 2}}
    assert resources.request(spec) == {
        "run_config": {"learningRate": 0.1},
        "selection": {"over_provision": 1.5},
        "policy": {"min_updates": 2},
    }


def test_its_health_is_told_on_the_pods_address_of_either_family() -> None:
    assert health_endpoint("10.0.0.7") == "http://10.0.0.7:8081/healthz"
    assert health_endpoint("fd00::7") == "http://[fd00::7]:8081/healthz"
