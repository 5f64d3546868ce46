"""Nodes as the API shows them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from fedtide.coordinator.fleet.fleet import Node
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.views import NodeView

SKEW_S = 30.0
"""A clock that is further off than this is shown as a fault; all works on."""


def node(
    state: Node, heartbeat: Heartbeat | None, clock_ahead_s: float | None = None, *, twins: bool = False
) -> NodeView:
    """A node, with its last heartbeat if one has arrived since this coordinator began to lead.

    Args:
        clock_ahead_s: its clock against that of the coordinator.
        twins: two processes with its identity were heard.
    """
    can = state.capabilities
    return NodeView(
        name=state.name,
        region=state.region,
        state="online" if state.online else "offline",
        reason=state.reason,
        since=state.since,
        labels=can.labels,
        cpus=can.cpus,
        memory_bytes=can.memory_bytes,
        disk_free_bytes=can.disk_free_bytes,
        extras=can.extras,
        samples=can.samples,
        node_config=can.node_config,
        inference_url=can.inference_url,
        agent_version=can.agent_version,
        python=can.python,
        sandbox=can.sandbox,
        hardware=can.hardware,
        rss_bytes=heartbeat.rss_bytes if heartbeat is not None else None,
        trainer_rss_bytes=heartbeat.trainer_rss_bytes if heartbeat is not None else None,
        busy=heartbeat.busy if heartbeat is not None else None,
        serving=heartbeat.serving if heartbeat is not None else {},
        inferences=heartbeat.inferences if heartbeat is not None else None,
        clock_ahead_s=clock_ahead_s,
        warnings=list(_warnings(state, clock_ahead_s, twins=twins)),
        refused=dict(state.refused),
        quarantined=state.quarantined,
    )


def _warnings(state: Node, clock_ahead_s: float | None, *, twins: bool) -> Iterator[str]:
    if state.quarantined:
        yield f"it is quarantined: {state.quarantined}"
    if clock_ahead_s is not None and abs(clock_ahead_s) > SKEW_S:
        yield f"its clock is {abs(clock_ahead_s):.0f} s {'ahead' if clock_ahead_s > 0 else 'behind'}: set up NTP"
    if twins:
        yield "two processes use its identity: a cloned disk? Revoke it, and give each its own name and token"
