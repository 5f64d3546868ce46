"""The samples for admission controllers: Rego by an interpreter, on what the charts render; Kyverno's by their form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from regopy import Interpreter

from tests.cluster.test_charts import CLOUD, render

POLICIES = Path(__file__).parents[2] / "deploy" / "policies"
DIGEST = f"sha256:{'a' * 64}"
IMAGE = {"registry": "registry.example.com/fedtide", "digests": dict.fromkeys(("coordinator", "aggregator"), DIGEST)}


def pods(chart: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for each in render(chart, values):
        template = each.get("spec", {}).get("template") if each["kind"] != "CronJob" else None
        if each["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job") and template is not None:
            found.append(template)
    return found


def violations(pod: dict[str, Any]) -> list[str]:
    template, constraint = yaml.safe_load_all((POLICIES / "gatekeeper.yaml").read_text())
    (target,) = template["spec"]["targets"]
    rego = Interpreter()
    rego.add_module("fedtidepods", target["rego"])
    rego.set_input({"review": {"object": pod}, "parameters": constraint["spec"]["parameters"]})
    found = json.loads(str(rego.query("data.fedtidepods.violation")))
    return [each["msg"] for each in found["expressions"][0]]


def ours(**spec: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "fedtide", "app.kubernetes.io/component": spec.pop("component", "nats")}
    good = {"allowPrivilegeEscalation": False}
    container = {"name": "c", "image": f"registry.example.com/x@{DIGEST}", "securityContext": good}
    container |= spec.pop("container", {})
    pod = {"containers": [container], "securityContext": {"runAsNonRoot": True}, **spec}
    return {"metadata": {"labels": labels}, "spec": pod}


def test_what_the_cloud_chart_renders_with_digests_is_let_in() -> None:
    nats = {"image": f"registry.example.com/nats@{DIGEST}"}
    found = pods(CLOUD, {"regions": ["eu"], "image": IMAGE, "nats": nats})
    assert len(found) >= 3
    assert [violations(pod) for pod in found] == [[]] * len(found)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a tag": (ours(container={"image": "registry.example.com/x:1"}), "named by a tag"),
    "another registry": (ours(container={"image": f"evil.example/x@{DIGEST}"}), "none of the registries"),
    "privileged": (ours(component="agent", container={"securityContext": {"privileged": True}}), "is privileged"),
    "without a security context": (ours(container={"securityContext": {}}), "may gain privileges"),
    "root": (ours(securityContext={}), "may run as root"),
    "a host's folder": (ours(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "folder of its host"),
}


@pytest.mark.parametrize("name", BAD)
def test_another_pod_is_refused_with_the_reason(name: str) -> None:
    pod, why = BAD[name]
    assert any(why in each for each in violations(pod)), violations(pod)


def test_the_agent_may_have_its_hosts_folder_and_others_pods_are_others_business() -> None:
    assert violations(ours(component="agent", volumes=[{"name": "v", "hostPath": {"path": "/var/lib"}}])) == []
    assert violations({"metadata": {"labels": {}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}) == []


def test_kyvernos_samples_say_what_a_policy_says() -> None:
    policies = list(yaml.safe_load_all((POLICIES / "kyverno.yaml").read_text()))
    assert {p["metadata"]["name"] for p in policies} == {"fedtide-signed-images", "fedtide-restricted"}
    for policy in policies:
        assert (policy["apiVersion"], policy["kind"]) == ("kyverno.io/v1", "ClusterPolicy")
        assert policy["spec"]["validationFailureAction"] == "Enforce"
        for rule in policy["spec"]["rules"]:
            assert set(rule) <= {"name", "match", "exclude", "validate", "verifyImages"}
            (resources,) = [each["resources"] for each in rule["match"]["any"]]
            assert resources["selector"]["matchLabels"]["app.kubernetes.io/part-of"] == "fedtide"
