"""A Kubernetes API server that Helm installs on: discovery, server-side apply, Secrets, workloads that get ready.

What the API server holds immutable is immutable here, so an upgrade that would be refused on a cluster is refused.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Iterator
from typing import Any

from tests.cluster.api_server import ApiServer, Key, Object, Refusal, parts

# group, version, plural, kind, namespaced
KINDS = [
    ("", "v1", "namespaces", "Namespace", False),
    ("", "v1", "pods", "Pod", True),
    ("", "v1", "secrets", "Secret", True),
    ("", "v1", "configmaps", "ConfigMap", True),
    ("", "v1", "services", "Service", True),
    ("", "v1", "serviceaccounts", "ServiceAccount", True),
    ("", "v1", "resourcequotas", "ResourceQuota", True),
    ("", "v1", "limitranges", "LimitRange", True),
    ("apps", "v1", "deployments", "Deployment", True),
    ("apps", "v1", "replicasets", "ReplicaSet", True),
    ("apps", "v1", "statefulsets", "StatefulSet", True),
    ("apps", "v1", "daemonsets", "DaemonSet", True),
    ("batch", "v1", "jobs", "Job", True),
    ("batch", "v1", "cronjobs", "CronJob", True),
    ("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True),
    ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", True),
    ("networking.k8s.io", "v1", "ingresses", "Ingress", True),
    ("rbac.authorization.k8s.io", "v1", "roles", "Role", True),
    ("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", True),
    ("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", False),
    ("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", False),
    ("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False),
    ("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", False),
]
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
MUTABLE = {
    "statefulsets": {
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
        "revisionHistoryLimit",
    },
    "jobs": {"suspend", "parallelism", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"},
}
"""Of these specs what an update may change (validation.go of apps and batch); of others all but the selector."""


class HelmServer(ApiServer):
    """Workloads are ready as soon as they are written; Jobs and Pods have succeeded."""

    def parse(self, raw: bytes) -> Any:
        return _protobuf_object(raw) if raw.startswith(b"k8s\0") else super().parse(raw)

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        found = self._discovery(path)
        if found is not None:
            return found
        plural, namespace, name, _ = parts(path)
        key: Key = (plural, namespace, name)
        if method == "POST":
            name = body["metadata"]["name"]
            key = (plural, namespace, name)
            if key in self.objects:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists')
            return self._write(key, body, dry="dryRun" in query)
        if method == "PUT" or (method == "PATCH" and body.get("apiVersion")):
            return self._write(key, body, dry="dryRun" in query)
        answered = super().answer(method, path, query, body)
        return answered if name else {**_kind_of_list(plural), **answered}

    def watch(self, path: str, query: dict[str, str], write: Callable[[str, Object], None]) -> None:
        if query.get("sendInitialEvents") == "true":
            with self._changed:
                listed = super().answer("GET", path, query, None)
            for body in listed["items"]:
                write("ADDED", body)
            version = listed["metadata"]["resourceVersion"]
            notes = {"k8s.io/initial-events-end": "true"}
            write("BOOKMARK", {"metadata": {"resourceVersion": version, "annotations": notes}})
            query = {**query, "resourceVersion": version}
        super().watch(path, query, write)

    def _write(self, key: Key, body: Object, *, dry: bool) -> Object:
        with self._changed:
            old = self.objects.get(key)
            new = copy.deepcopy(body)
            for name, text in new.pop("stringData", {}).items() if key[0] == "secrets" else ():
                new.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()
            kept = {"generation": 1} if old is None else {k: old["metadata"][k] for k in ("uid", "generation")}
            new["metadata"].update(kept, **({"namespace": key[1]} if key[1] else {}))
            if old is not None:
                _check_immutable(key, old.get("spec", {}), new.get("spec", {}))
                new["metadata"]["generation"] += old.get("spec") != new.get("spec")
            status = _ready(key[0], new)
            if status is not None:
                new["status"] = status
            return new if dry else self.put(key[0], new)

    def _discovery(self, path: str) -> Object | None:
        words = [w for w in path.split("/") if w]
        versions = sorted({(group, version) for group, version, *_ in KINDS})
        if words[:2] == ["openapi", "v2"]:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        if words == ["version"]:
            return {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
        if words[:2] == ["openapi", "v3"]:
            return _openapi(words[2:], versions)
        if words == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        if words == ["apis"]:
            named = [(g, {"groupVersion": f"{g}/{v}", "version": v}) for g, v in versions if g]
            return {"groups": [{"name": g, "versions": [v], "preferredVersion": v} for g, v in named]}
        here = ("", words[1]) if words[0] == "api" else tuple(words[1:3])
        if len(words) != (2 if words[0] == "api" else 3):
            return None
        kinds = [
            {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": namespaced, "verbs": VERBS}
            for group, version, plural, kind, namespaced in KINDS
            if (group, version) == here
        ]
        return {"kind": "APIResourceList", "groupVersion": "/".join(w for w in here if w), "resources": kinds}


def _kind_of_list(plural: str) -> Object:
    group, version, _, kind, _ = next(k for k in KINDS if k[2] == plural)
    return {"kind": f"{kind}List", "apiVersion": f"{group}/{version}".lstrip("/")}


def _openapi(words: list[str], versions: list[tuple[str, str]]) -> Object:
    """Enough of the schema for a client to see that fields are validated by the server."""
    if not words:
        urls = {f"apis/{g}/{v}" if g else f"api/{v}" for g, v in versions}
        return {"paths": {url: {"serverRelativeURL": f"/openapi/v3/{url}?hash=x"} for url in urls}}
    here = tuple(words[1:3]) if words[0] == "apis" else ("", words[1])
    validated = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    paths: Object = {}
    for group, version, plural, kind, namespaced in KINDS:
        if (group, version) == here:
            space = "/namespaces/{namespace}/" if namespaced else "/"
            gvk = {"group": group, "version": version, "kind": kind}
            patch = {"parameters": validated, "x-kubernetes-group-version-kind": gvk, "x-kubernetes-action": "patch"}
            responses = {"200": {"description": "OK"}}
            paths["/" + "/".join(words) + space + plural + "/{name}"] = {"patch": {**patch, "responses": responses}}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.37.0"}, "paths": paths}


def _check_immutable(key: Key, old: Object, new: Object) -> None:
    plural, _, name = key
    changed = {field for field in {*old, *new} if old.get(field) != new.get(field)}
    wrong = changed - MUTABLE[plural] if plural in MUTABLE else changed & {"selector"} - ({"selector"} & _free(plural))
    if wrong:
        raise Refusal(422, "Invalid", f'{plural} "{name}" is invalid: spec: Forbidden: updates to {sorted(wrong)}')


def _free(plural: str) -> set[str]:
    """Services and budgets may select other pods from one day to the next."""
    return {"selector"} if plural not in ("deployments", "daemonsets") else set()


def _ready(plural: str, body: Object) -> Object | None:
    """The status that its controller would reach."""
    now, count = "2026-01-01T00:00:00Z", body.get("spec", {}).get("replicas", 1)
    seen = {"observedGeneration": body["metadata"]["generation"]}
    replicas = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas", "availableReplicas"), count)
    if plural == "deployments":
        conditions = [{"type": "Available", "status": "True"}]
        progressing = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
        return {**seen, **replicas, "conditions": [*conditions, progressing]}
    if plural == "statefulsets":
        return {**seen, **replicas, "currentReplicas": count, "currentRevision": "a", "updateRevision": "a"}
    if plural == "daemonsets":
        numbers = ("desiredNumberScheduled", "currentNumberScheduled", "numberReady", "updatedNumberScheduled")
        return {**seen, **dict.fromkeys(numbers, 1), "numberAvailable": 1, "numberMisscheduled": 0}
    if plural == "jobs":
        complete = {"type": "Complete", "status": "True", "lastTransitionTime": now}
        return {"succeeded": 1, "startTime": now, "completionTime": now, "conditions": [complete]}
    if plural == "pods":
        return {"phase": "Succeeded", "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted"}]}
    if plural == "customresourcedefinitions":
        conditions = [{"type": kind, "status": "True"} for kind in ("Established", "NamesAccepted")]
        return {"conditions": conditions, "acceptedNames": body["spec"]["names"]}
    return None


def _protobuf_object(raw: bytes) -> Object:
    """A Secret as client-go's typed clients send it (k8s.io/api/core/v1/generated.proto), or just its kind."""
    unknown = dict(_fields(raw[4:]))
    kind = {number: value.decode() for number, value in _fields(unknown[1])}
    body: Object = {"apiVersion": kind.get(1, ""), "kind": kind.get(2, "")}
    if body["kind"] != "Secret":
        return body
    metadata: Object = {}
    data: dict[str, str] = {}
    for number, value in _fields(unknown[2]):
        if number == 1:
            for field, inner in _fields(value):
                if field == 1:
                    metadata["name"] = inner.decode()
                elif field == 11:
                    name, text = _entry(inner)
                    metadata.setdefault("labels", {})[name] = text.decode()
        elif number == 2:
            name, content = _entry(value)
            data[name] = base64.b64encode(content).decode()
        elif number == 3:
            body["type"] = value.decode()
    return {**body, "metadata": metadata, "data": data}


def _entry(raw: bytes) -> tuple[str, bytes]:
    pair = dict(_fields(raw))
    return pair.get(1, b"").decode(), pair.get(2, b"")


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Field numbers and values of a protobuf message; numbers (wire type 0) are skipped."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(raw):
        tag = varint()
        if tag & 7 == 0:
            varint()
            continue
        length = varint()
        yield tag >> 3, raw[at : at + length]
        at += length
