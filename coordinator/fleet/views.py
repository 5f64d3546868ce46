"""Nodes as the API shows them. Pure."""

from __future__ import annotations

from fedtide.coordinator.fleet.fleet import Node
from fedtide.fabric.messages.heartbeat import Heartbeat
from fedtide.fabric.messages.views import NodeView


def node(state: Node, heartbeat: Heartbeat | None) -> NodeView:
    """A node, with its last heartbeat if one has arrived since this coordinator began to lead."""
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
        rss_bytes=heartbeat.rss_bytes if heartbeat is not None else None,
        trainer_rss_bytes=heartbeat.trainer_rss_bytes if heartbeat is not None else None,
        busy=heartbeat.busy if heartbeat is not None else None,
        serving=heartbeat.serving if heartbeat is not None else {},
        inferences=heartbeat.inferences if heartbeat is not None else None,
    )
