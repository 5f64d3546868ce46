"""`python -m fedtide.fabric.cluster.restarts -n NAMESPACE KIND/NAME ...`: workloads get new pods, by their strategy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from http import HTTPStatus

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fedtide.fabric.cluster.connection import api_client
from fedtide.fabric.errors import ConfigError, FedtideError, TransientError

ANNOTATION = "fedtide.dev/rotated"


def restart(api: client.ApiClient, namespace: str, workloads: Iterable[str]) -> list[str]:
    """Begin the roll-outs; returns of which. A workload that is not there is left out.

    Args:
        workloads: `deployment/NAME`, `daemonset/NAME`, `statefulset/NAME`.

    Raises:
        ConfigError: another kind.
        TransientError: the API server refuses.
    """
    apps = client.AppsV1Api(api)
    patches = {
        "deployment": apps.patch_namespaced_deployment,
        "daemonset": apps.patch_namespaced_daemon_set,
        "statefulset": apps.patch_namespaced_stateful_set,
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    body = {"spec": {"template": {"metadata": {"annotations": {ANNOTATION: now}}}}}
    done = []
    for workload in workloads:
        kind, _, name = workload.partition("/")
        if kind not in patches:
            raise ConfigError("workload", f"{workload!r} cannot be restarted", f"Kinds: {', '.join(patches)}")
        try:
            patches[kind](name, namespace, body)
            done.append(workload)
        except ApiException as exc:
            if exc.status != HTTPStatus.NOT_FOUND:
                raise TransientError(f"{workload}: the Kubernetes API says {exc.status} {exc.reason}") from exc
    return done


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", "--namespace", required=True)
    parser.add_argument("workloads", nargs="+")
    asked = parser.parse_args()
    try:
        print(f"restarted: {', '.join(restart(api_client(), asked.namespace, asked.workloads)) or 'nothing'}")
    except FedtideError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
