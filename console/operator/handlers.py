"""All handlers of custom resources, and how kopf is set up for them.

The coordinator's log is the source of truth. The id of what a resource starts is derived from its uid, so a
restarted operator starts nothing twice. The system also works without custom resources.
"""

from __future__ import annotations

from typing import Any

import kopf

from fedtide.console.client import Client
from fedtide.console.operator import model_handlers, rollout_handlers, rule_handlers, run_handlers
from fedtide.console.operator.following import Following
from fedtide.console.operator.resources import GROUP

FINALIZER = f"{GROUP}/ends-first"


def handlers(client: Client, following: Following) -> kopf.OperatorRegistry:
    """All handlers, over clients of the coordinator."""
    registry = kopf.OperatorRegistry()
    _logs_in(registry)
    for kind in (run_handlers, rollout_handlers, rule_handlers, model_handlers):
        kind.register(registry, client, following)
    return registry


def settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.persistence.finalizer = FINALIZER
    chosen.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    chosen.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    chosen.posting.enabled = False  # the log has it all, and events would need rights of their own
    # kopf waits so long at its start, too, until it believes that our Role may not list namespaces.
    chosen.networking.error_backoffs = [0.5, 1, 2]
    return chosen


def _logs_in(registry: kopf.OperatorRegistry) -> None:
    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        """As the pod's service account; outside a cluster as the kubeconfig says."""
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
