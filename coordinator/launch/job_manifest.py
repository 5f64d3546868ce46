"""The Job of one aggregator, and the Secret that it reads. Pure.

The Job runs its pod once: only the coordinator begins further attempts, so that no attempt runs twice.
https://kubernetes.io/docs/concepts/workloads/controllers/job/ (pod failure policy, TTL, suspend)
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.config import Kubernetes, Tier

PREFIX = "fedtide.dev/"
COMPONENT = "app.kubernetes.io/component"
AGGREGATORS = f"{COMPONENT}=aggregator,app.kubernetes.io/part-of=fedtide"
CONFIG_DIR, TLS_DIR, WORK_DIR = "/etc/fedtide/run", "/etc/fedtide/tls", "/work"
USER = 10001
_UNDISTURBED = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
"""By which Karpenter and the Cluster Autoscaler leave the machine of a pod alone."""

Manifest = dict[str, Any]


def name_of(config: Kubernetes, run: str, attempt: int) -> str:
    """The name of an attempt's Job and of its Secret."""
    whose = f"{config.release}-{config.tenant}" if config.tenant else config.release
    return f"{whose}-{run}-{attempt}".lower().replace("_", "-")[:63].rstrip("-")


def selector(config: Kubernetes, tenant: str) -> str:
    """Of the Jobs and Secrets of one tenant."""
    whose = f"app.kubernetes.io/instance={config.release},{PREFIX}tenant={tenant.strip('-_')}"
    return f"{AGGREGATORS},{whose}"


def secret(
    config: Kubernetes, command: LaunchAggregator, tenant: str, files: Mapping[str, str], owner: Sequence[Manifest] = ()
) -> Manifest:
    """What the aggregator reads. It is created before the Job, and shows that this attempt was begun."""
    data = {k: base64.b64encode(v.encode()).decode() for k, v in files.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(config, command, tenant, owner),
        "type": "Opaque",
        "immutable": True,
        "data": data,
    }


def job(
    config: Kubernetes,
    command: LaunchAggregator,
    tenant: str,
    model_bytes: int | None,
    owner: Sequence[Manifest] = (),
) -> Manifest:
    """The Job of one attempt.

    Args:
        model_bytes: size of the model's arrays, if there is a release of it already.
        owner: with what the Job goes (`ownerReferences`).
    """
    metadata = _metadata(config, command, tenant, owner)
    if config.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = config.queue
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "suspend": bool(config.queue),
            "ttlSecondsAfterFinished": config.ttl_s,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    # A pod that is drained, preempted or reclaimed is no fault of the run: its successor resumes.
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    # By this rule the Job's message has the exit code, also when the pod is gone.
                    {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}},
                ]
            },
            "template": {"metadata": _pod_metadata(config, metadata), "spec": _pod(config, command, model_bytes)},
        },
    }


def _pod_metadata(config: Kubernetes, of_job: Manifest) -> Manifest:
    labels = {"labels": dict(of_job["labels"])}
    annotations = {**config.annotations, **(_UNDISTURBED if config.undisturbed else {})}
    return {**labels, "annotations": annotations} if annotations else labels


def _affinity(config: Kubernetes) -> Manifest:
    """Where the aggregator runs best: near the hub, if that is wanted, by zone."""
    found: Manifest = {"nodeAffinity": config.node_affinity} if config.node_affinity else {}
    if config.near_hub:
        hub = {"app.kubernetes.io/instance": config.release, COMPONENT: "nats"}
        term = {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": hub}}
        preferred = [{"weight": 100, "podAffinityTerm": term}]
        found["podAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": preferred}
    return found


def has_larger(config: Kubernetes, model_bytes: int | None, escalation: int) -> bool:
    """Whether the attempt after one that ran out of memory gets a larger machine."""
    return tier_of(config, model_bytes, escalation) is not config.tiers[-1]


def tier_of(config: Kubernetes, model_bytes: int | None, escalation: int = 0) -> Tier:
    """The first tier that is large enough, for a model of unknown size the first; and `escalation` tiers more."""
    number = 0
    if model_bytes is not None:
        limits = [tier.up_to_bytes for tier in config.tiers]
        fits = [n for n, limit in enumerate(limits) if limit is None or model_bytes <= limit]
        number = fits[0] if fits else len(limits) - 1
    return config.tiers[min(number + escalation, len(config.tiers) - 1)]


def _metadata(config: Kubernetes, command: LaunchAggregator, tenant: str, owner: Sequence[Manifest]) -> Manifest:
    labels = {
        **config.labels,
        "app.kubernetes.io/name": "fedtide",
        "app.kubernetes.io/part-of": "fedtide",
        "app.kubernetes.io/instance": config.release,
        "app.kubernetes.io/managed-by": "fedtide-coordinator",
        COMPONENT: "aggregator",
        f"{PREFIX}run": command.run,
        f"{PREFIX}attempt": str(command.attempt),
        f"{PREFIX}tenant": tenant.strip("-_"),  # a label must not begin or end with these
    }
    if command.spec.model:
        labels[f"{PREFIX}model"] = command.spec.model.strip("-_")
    name = name_of(config, command.run, command.attempt)
    owned = {"ownerReferences": list(owner)} if owner else {}
    return {"name": name, "namespace": config.namespace, "labels": labels, **owned}


def _pod(config: Kubernetes, command: LaunchAggregator, model_bytes: int | None) -> Manifest:
    tier = tier_of(config, model_bytes, command.escalation)
    name = name_of(config, command.run, command.attempt)
    pod: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace_s,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
            **config.security_context,
        },
        "containers": [
            {
                "name": "aggregator",
                "image": config.image,
                **({"imagePullPolicy": config.image_pull_policy} if config.image_pull_policy else {}),
                "args": [f"{CONFIG_DIR}/config.json"],
                "env": [{"name": "HOME", "value": WORK_DIR}],
                "resources": {
                    "limits": tier.resources,
                    "requests": tier.resources,
                    **({"claims": [{"name": claim} for claim in tier.claims]} if tier.claims else {}),
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [
                    {"name": "run", "mountPath": CONFIG_DIR, "readOnly": True},
                    {"name": "tls", "mountPath": TLS_DIR, "readOnly": True},
                    {"name": "work", "mountPath": WORK_DIR},
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # in the pod, an emptyDir of its own
                ],
            }
        ],
        "volumes": [
            {"name": "run", "secret": {"secretName": name, "defaultMode": 0o440}},
            {
                "name": "tls",
                "secret": {
                    "secretName": config.ca_secret or f"{config.release}-servers",
                    "items": [{"key": "ca.crt", "path": "ca.crt"}],
                    "optional": True,
                },
            },
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    optional = {
        "serviceAccountName": config.service_account,
        "priorityClassName": config.priority_class,
        "tolerations": config.tolerations,
        "nodeSelector": {**config.node_selector, **tier.node_selector},
        "affinity": _affinity(config),
        "schedulerName": config.scheduler,
        # https://kubernetes.io/docs/concepts/scheduling-eviction/dynamic-resource-allocation/
        "resourceClaims": [{"name": c, "resourceClaimTemplateName": t} for c, t in tier.claims.items()],
        "imagePullSecrets": [{"name": n} for n in config.image_pull_secrets],
    }
    return {**pod, **{k: v for k, v in optional.items() if v}}
