"""This node in the cluster: labels of its zone, machine and accelerator, and whether it is cordoned.

Read from the Kubernetes API with the pod's own token, without a client library.
https://kubernetes.io/docs/reference/labels-annotations-taints/
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtide.edge_agent.config import NODE
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.process.listening import in_url
from fedtide.fabric.strict import ConfigValues, Scalar

log = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ASK_EVERY_S = 30.0
NODE_CONFIG = "config.fedtide.dev/"
"""Labels of a Kubernetes node that are Flower's node config there."""

_LABELS = {
    "topology.kubernetes.io/region": "cloud-region",
    "topology.kubernetes.io/zone": "zone",
    "node.kubernetes.io/instance-type": "instance-type",
    "kubernetes.io/arch": "arch",
    "nvidia.com/gpu.product": "accelerator",
    "cloud.google.com/gke-accelerator": "accelerator",
}
_SPOT = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """`labels` are ours, not the cluster's; `schedulable` is false while the node is cordoned or drained."""

    labels: Mapping[str, str] = field(default_factory=dict)
    schedulable: bool = True
    node_config: ConfigValues = field(default_factory=dict)
    """From its labels that begin with NODE_CONFIG."""


def describe(node: Mapping[str, Any]) -> ClusterNode:
    """From a Node object. A spot machine has the label `spot=true`."""
    theirs = node["metadata"].get("labels", {})
    labels = {ours: theirs[name] for name, ours in _LABELS.items() if theirs.get(name)}
    labels["spot"] = str(any(theirs.get(name) == value for name, value in _SPOT.items())).lower()
    told = {name.removeprefix(NODE_CONFIG): _scalar(v) for name, v in theirs.items() if name.startswith(NODE_CONFIG)}
    return ClusterNode(labels, not node["spec"].get("unschedulable", False), told)


def _scalar(text: str) -> Scalar:
    """Labels are texts; apps want numbers and booleans."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


class ClusterView:
    """Reads one Node object; disabled without `FEDTIDE_KUBERNETES_NODE`."""

    def __init__(self, environ: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> None:
        self._name = environ.get(NODE, "")
        scheme = environ.get("FEDTIDE_KUBERNETES_SCHEME", "https")
        host = in_url(environ.get("KUBERNETES_SERVICE_HOST", ""))
        self._url = f"{scheme}://{host}:{environ.get('KUBERNETES_SERVICE_PORT')}/api/v1/nodes/{self._name}"
        self._account = account
        self.now = ClusterNode()

    @property
    def is_there(self) -> bool:
        return bool(self._name)

    async def look(self) -> bool:
        """Ask once; returns whether anything changed. Without an answer nothing changes."""
        try:
            seen = describe(await asyncio.to_thread(self._ask))
        except (OSError, ValueError, KeyError) as exc:
            log.warning("cluster.node_unknown", extra={"node": self._name, "reason": str(exc)})
            return False
        changed, self.now = seen != self.now, seen
        return changed

    def _ask(self) -> dict[str, Any]:
        try:
            token = (self._account / "token").read_text(encoding="utf-8").strip()
        except OSError as exc:
            raise ConfigError(str(exc.filename), "the pod has no service account token") from exc
        request = urllib.request.Request(self._url, headers={"Authorization": f"Bearer {token}"})  # noqa: S310
        context = None
        if self._url.startswith("https:"):
            context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:  # noqa: S310  # the pod's own API
            node: dict[str, Any] = json.load(answer)
        return node
