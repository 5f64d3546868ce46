"""The charts as Helm itself renders them: every example is valid, restricted, and wrong values are explained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from pydantic import TypeAdapter

from fedtide.aggregation.folding.fold_worker import FoldWorkerConfig
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.release_authority.config import AuthorityConfig
from fedtide.edge_agent.config import load
from fedtide.edge_agent.drift.collector import CollectorConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
CLOUD, EDGE = DEPLOY / "cloud" / "fedtide", DEPLOY / "k3s" / "fedtide-edge"
EXAMPLES = sorted([*CLOUD.glob("examples/*.yaml"), *EDGE.glob("examples/*.yaml")])
FOREIGN = ("PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject", "Certificate")
"""Kinds of other projects: their schemas are not Kubernetes' own."""

Object = dict[str, Any]


def render(chart: Path, values: Object, name: str = "ft", namespace: str = "fl") -> list[Object]:
    with helm.Chart.load(str(chart)) as loaded:
        files = loaded.render(values, name=name, namespace=namespace)
    texts = [text for path, text in files.items() if not path.endswith("NOTES.txt")]
    return [body for text in texts for body in yaml.safe_load_all(text) if body]


def example(file: Path) -> list[Object]:
    return render(file.parents[1], yaml.safe_load(file.read_text()))


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for body in objects:
        name = f"{body['kind']}/{body['metadata']['name']}"
        if body["kind"] == "Pod":
            yield name, body["spec"]
        elif "template" in body.get("spec", {}):
            yield name, body["spec"]["template"]["spec"]
        elif "jobTemplate" in body.get("spec", {}):
            yield name, body["spec"]["jobTemplate"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f"{f.parents[1].name}-{f.stem}")
def test_every_example_is_valid_and_its_pods_are_restricted(file: Path) -> None:
    objects = example(file)
    for body in objects:
        if body["kind"] not in FOREIGN:
            kubernetes_validate.validate(body, "1.37", strict=True)
        assert body["metadata"].get("labels"), body["metadata"]["name"]
    for name, pod in pods(objects):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        for container in pod["containers"]:
            allowed = container["securityContext"]
            assert allowed["readOnlyRootFilesystem"] is True, name
            assert allowed["allowPrivilegeEscalation"] is False, name
            assert allowed["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name


def test_helm_finds_nothing_to_complain_about() -> None:
    for chart, values in ((CLOUD, CLOUD / "examples/eks.yaml"), (EDGE, EDGE / "examples/shops.yaml")):
        result = helm.lint(str(chart), yaml.safe_load(values.read_text()), strict=True, namespace="fl")
        assert [m for m in result["messages"] if m["severity"] >= 2] == []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f"{f.parents[1].name}-{f.stem}")
def test_the_processes_understand_the_configuration_they_are_given(file: Path, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "coordinator.json": CoordinatorConfig,
        "collector.json": CollectorConfig,
        "regional.json": FoldWorkerConfig,
        "authority.json": AuthorityConfig,
    }
    for body in example(file):
        for name, text in body.get("data", {}).items() if body["kind"] == "ConfigMap" else ():
            if name == "agent.json":
                (tmp_path / name).write_text(text)
                node = {"FEDTIDE_KUBERNETES_NODE": "ip-10-0-0-1.eu.compute.internal"}
                assert load(tmp_path / name, node).node == "ip-10-0-0-1-eu-compute-internal"
            elif name.endswith(".json") and not body["metadata"]["name"].endswith("-dashboards"):
                TypeAdapter(kinds[name]).validate_python(json.loads(text))


def test_further_settings_of_the_coordinator_reach_it_and_so_do_the_ports_that_they_need() -> None:
    values = yaml.safe_load((CLOUD / "examples/eks.yaml").read_text())
    values["coordinator"] = {"config": {"packages": {"index": "https://pypi.example"}, "data_dir": "/not/this"}}
    values["networkPolicy"] = {"egressPorts": [5000]}
    objects = render(CLOUD, values)
    (text,) = [b["data"]["coordinator.json"] for b in objects if "coordinator.json" in b.get("data", {})]
    config = CoordinatorConfig.model_validate_json(text)
    assert config.packages.index == "https://pypi.example" and str(config.data_dir) == "/var/lib/fedtide"
    policies = {b["metadata"]["name"]: b["spec"] for b in objects if b["kind"] == "NetworkPolicy"}
    for name in ("ft-coordinator", "ft-workers"):
        assert {"protocol": "TCP", "port": 5000} in policies[name]["egress"][0]["ports"], sorted(policies)


PODS: Object = {
    "nodeSelector": {"pool": "fl"},
    "tolerations": [{"key": "fl", "operator": "Exists"}],
    "labels": {"cost": "fl"},
    "annotations": {"example.com/scan": "yes"},
    "priorityClassName": "important",
    "securityContext": {"seLinuxOptions": {"type": "container_t"}},
}
DIGESTS = {name: f"sha256:{digit * 64}" for name, digit in (("coordinator", "a"), ("aggregator", "b"), ("agent", "c"))}


@pytest.mark.parametrize("file", [CLOUD / "examples/eks.yaml", EDGE / "examples/shops.yaml"], ids=lambda f: f.stem)
def test_what_is_said_of_all_pods_reaches_every_pod(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    objects = render(file.parents[1], {**values, "pods": PODS})
    found = dict(pods(objects))
    assert len(found) >= 3
    for name, pod in found.items():
        assert pod["nodeSelector"]["pool"] == "fl", name
        assert PODS["tolerations"][0] in pod["tolerations"], name
        assert pod["securityContext"]["seLinuxOptions"] == {"type": "container_t"}, name
        assert pod["priorityClassName"] == "important" or "agent" in pod["priorityClassName"], name
    for body in objects:
        template = body if body["kind"] == "Pod" else body.get("spec", {}).get("template", {})
        if "spec" in template and "containers" in template["spec"]:
            assert template["metadata"]["labels"]["cost"] == "fl", body["metadata"]["name"]
            assert template["metadata"]["annotations"]["example.com/scan"] == "yes", body["metadata"]["name"]
            kubernetes_validate.validate(body, "1.37", strict=True)


def test_an_edge_may_speak_to_its_hub_and_to_nobody_else() -> None:
    values = yaml.safe_load((EDGE / "examples/shops.yaml").read_text())
    hub = {**values["hub"], "url": "tls://hub.example.com:7777"}
    allowed = {"enabled": True, "egressPorts": [5432], "inferenceFrom": [{"podSelector": {"matchLabels": {"a": "b"}}}]}
    objects = render(EDGE, {**values, "hub": hub, "networkPolicy": allowed})
    policies = {b["metadata"]["name"]: b for b in objects if b["kind"] == "NetworkPolicy"}
    for body in policies.values():
        kubernetes_validate.validate(body, "1.37", strict=True)
    ports = {n: {p["port"] for e in b["spec"].get("egress", []) for p in e["ports"]} for n, b in policies.items()}
    assert ports["ft-leaf"] == {7777} and ports["ft-agent"] == {4222, 443, 6443, 5432}
    components = {
        b["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for b in objects
        if "template" in b.get("spec", {})
    }
    named = json.dumps([b["spec"]["podSelector"] for b in policies.values()])
    assert all(f'"{each}"' in named for each in components)
    assert [b for b in render(EDGE, values) if b["kind"] == "NetworkPolicy"] == []


def test_each_image_may_be_named_by_its_digest_and_jobs_follow() -> None:
    values = yaml.safe_load((CLOUD / "examples/eks.yaml").read_text())
    image = {**values.get("image", {}), "pullPolicy": "Always"}
    image["digests"] = {name: DIGESTS[name] for name in ("coordinator", "aggregator")}
    objects = render(CLOUD, {**values, "image": image, "pods": PODS})
    used = {c["image"] for _, pod in pods(objects) for c in pod["containers"]}
    assert any(each.endswith(f"fedtide-coordinator@{DIGESTS['coordinator']}") for each in used)
    (text,) = [b["data"]["coordinator.json"] for b in objects if "coordinator.json" in b.get("data", {})]
    jobs = CoordinatorConfig.model_validate_json(text).kubernetes
    assert jobs is not None
    assert jobs.image.endswith(f"fedtide-aggregator@{DIGESTS['aggregator']}") and jobs.image_pull_policy == "Always"
    assert jobs.node_selector == {"pool": "fl"} and PODS["tolerations"][0] in jobs.tolerations
    assert jobs.labels["cost"] == "fl" and jobs.annotations == PODS["annotations"]
    edge = yaml.safe_load((EDGE / "examples/shops.yaml").read_text())
    edge["image"] = {**edge.get("image", {}), "digests": {"agentTrain": DIGESTS["agent"], "agent": ""}}
    agents = {c["image"] for n, pod in pods(render(EDGE, edge)) if "DaemonSet" in n for c in pod["containers"]}
    assert all("@" in each or ":" in each for each in agents)


def test_selectors_and_names_do_not_depend_on_the_version() -> None:
    """What cannot be changed by an upgrade must not change with one."""
    for body in example(CLOUD / "examples/eks.yaml"):
        for field in ("selector", "serviceName", "volumeClaimTemplates"):
            assert "0.2.0" not in json.dumps(body.get("spec", {}).get(field, "")), body["metadata"]["name"]


def test_what_examples_do_not_switch_on_is_valid_too() -> None:
    everything = {
        "regions": ["eu"],
        "backup": {"enabled": True, "to": "s3://b/x/", "secret": "s3", "podLabels": {"a": "b"}, "ports": [443, 80]},
        "restore": {"from": "s3://b/x/"},
        "rotation": {"schedule": "41 4 * * 0", "hub": True},
        "nats": {"exporter": {"enabled": True}},
        "tenants": {"namespaces": ["acme"], "releaseAuthorities": ["acme", "globex"]},
        "pods": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}},
    }
    account = "A" + "B" * 55
    edge = {"region": "eu", "hub": {"url": "tls://h:7422", "accounts": {"region": account, "system": account}}}
    edge |= {"rotation": {"schedule": "41 4 * * 0"}, "networkPolicy": {"enabled": True}}
    without = {"regions": ["eu"], "operator": {"enabled": False}}
    objects = [*render(CLOUD, everything), *render(EDGE, edge), *render(CLOUD, without)]
    for body in objects:
        if body["kind"] not in FOREIGN:
            kubernetes_validate.validate(body, "1.37", strict=True)
    own = {b["metadata"]["name"]: b for b in objects if b["kind"] == "StatefulSet"}
    of_acme = json.dumps(own["ft-release-authority-acme"])
    assert (
        "ft-release-authority-acme"
        in own["ft-release-authority-acme"]["spec"]["template"]["spec"]["volumes"][1]["secret"]["secretName"]
    )
    assert "globex" not in of_acme
    (theirs,) = [b for b in objects if b["kind"] == "Role" and b["metadata"]["namespace"] == "acme"]
    assert not any("configmaps" in rule["resources"] for rule in theirs["rules"]), "the log's mark is nobody's of acme"
    (restore,) = [b for b in objects if b["kind"] == "Job" and "restore" in b["metadata"]["name"]]
    assert restore["spec"]["template"]["metadata"]["labels"]["a"] == "b"
    jobs = [json.dumps(b) for b in objects if b["metadata"]["name"] == "ft-identity" and b["kind"] == "Job"]
    assert ["--restore" in job and "--lifetime-days" in job for job in jobs] == [True, False]
    ends = [b["metadata"]["annotations"]["helm.sh/hook"] for b in objects if b["metadata"]["name"] == "ft-operator-end"]
    assert set(ends) == {"post-delete", "post-upgrade,post-delete"}


def test_alerts_and_dashboards_ask_for_metrics_that_there_are() -> None:
    values = {
        "regions": ["eu"],
        "dashboards": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "networkPolicy": {"ingressFrom": [{"namespaceSelector": {}}], "monitorFrom": [{"namespaceSelector": {}}]},
        "nats": {"exporter": {"enabled": True}},
    }
    objects = render(CLOUD, values)
    (rules,) = [b for b in objects if b["kind"] == "PrometheusRule"]
    (dashboards,) = [b for b in objects if b["metadata"]["name"] == "ft-dashboards"]
    asked = json.dumps(rules) + "".join(dashboards["data"].values())
    page = (CLOUD.parents[2] / "docs" / "kubernetes.md").read_text()
    known = set(re.findall(r"^\| `(fedtide_[a-z_]+)` \|", page, re.MULTILINE))
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"fedtide_[a-z_]+", asked)}
    assert named <= known and len(known) > 10
    for body in json.loads(dashboards["data"]["fedtide.json"])["panels"]:
        assert body["targets"] and body["gridPos"]["w"] <= 24
    assert {b["kind"] for b in objects} >= {"PodMonitor", "ServiceMonitor"}


def test_agents_are_scraped_by_the_port_that_they_have() -> None:
    values = yaml.safe_load((EDGE / "examples/shops.yaml").read_text())
    objects = render(EDGE, {**values, "podMonitor": {"enabled": True, "labels": {"release": "prom"}}})
    (monitor,) = [b for b in objects if b["kind"] == "PodMonitor"]
    (agent,) = [b for b in objects if b["kind"] == "DaemonSet"]
    labels = agent["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {p["name"] for c in agent["spec"]["template"]["spec"]["containers"] for p in c.get("ports", [])}
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= ports
    assert monitor["metadata"]["labels"]["release"] == "prom"


def test_secrets_that_the_coordinators_configuration_names_are_there() -> None:
    objects = render(CLOUD, {"regions": ["eu"], "coordinator": {"secrets": ["slack"]}})
    (pod,) = [
        b["spec"]["template"]["spec"]
        for b in objects
        if b["metadata"]["name"] == "ft-coordinator" and "spec" in b and "template" in b["spec"]
    ]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"].startswith("/etc/fedtide/secrets")]
    assert mount["mountPath"] == "/etc/fedtide/secrets/slack" and mount["readOnly"]
    assert {"name": mount["name"], "secret": {"secretName": "slack"}} in pod["volumes"]


def test_the_coordinator_may_do_what_it_does_and_no_more() -> None:
    (role,) = [
        b
        for b in example(CLOUD / "examples/one-machine.yaml")
        if b["kind"] == "Role" and b["metadata"]["name"] == "ft-coordinator"
    ]
    allowed = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert allowed == {
        *(("jobs", v) for v in ("create", "get", "list", "watch", "delete")),
        *(("secrets", v) for v in ("create", "list", "delete")),
        *(("configmaps", v) for v in ("create", "get", "patch")),
        ("pods", "list"),
        ("events", "list"),
        ("serviceaccounts", "get"),
    }


@pytest.mark.parametrize(
    ("chart", "changes", "said"),
    [
        (CLOUD, {"regions": []}, "name the regions that will join"),
        (CLOUD, {"nats": {"enabled": False}}, "set nats.externalUrl"),
        (CLOUD, {"nats": {"replicas": 2}}, "/nats/replicas"),
        (CLOUD, {"nats": {"storage": {"size": "20G"}}}, "/nats/storage/size"),
        (CLOUD, {"ingress": {"enabled": True}}, "set ingress.host"),
        (CLOUD, {"serviceMonitor": {"enabled": True}}, "set networkPolicy.ingressFrom"),
        (CLOUD, {"coordinater": {}}, "'coordinater' not allowed"),
        (CLOUD, {"aggregator": {"tiers": [{"resources": {"nvidia.com/gpu": "one"}}]}}, "nvidia.com"),
        (EDGE, {"region": ""}, "one of the cloud chart's regions"),
        (EDGE, {"region": "eu", "hub": {"url": "nats://hub:7422"}}, "/hub/url"),
        (EDGE, {"region": "eu", "hub": {"url": "tls://hub:7422"}}, "fedtide fleet region"),
        (EDGE, {"agent": {"priority": 10}}, "/agent/priority"),
    ],
)
def test_wrong_values_are_refused_with_words_that_help(chart: Path, changes: Object, said: str) -> None:
    with pytest.raises(helm.HelmError) as caught:
        render(chart, {"regions": ["eu"], **changes} if chart == CLOUD else changes)
    assert said in str(caught.value)
