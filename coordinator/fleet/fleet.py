"""The fleet: nodes, what they can do, and whether they are online. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from fedtide.coordinator.commands import AnnouncePresence, Commands
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import NodeJoined, NodeOffline, NodeOnline
from fedtide.fabric.messages.heartbeat import Capabilities

NodeEvent = NodeJoined | NodeOnline | NodeOffline


@dataclass(frozen=True, slots=True)
class Node:
    """`reason` says why it is offline; `since` is when `online` last changed."""

    name: str
    region: str
    capabilities: Capabilities
    online: bool
    since: datetime
    reason: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """The node's labels; its region and name count as labels too."""
        own = {"region": self.region, "node": self.name}
        return {"hardware": self.capabilities.hardware, **self.capabilities.labels, **own}


def step(state: Node | None, event: NodeEvent, at: datetime) -> tuple[Node, Commands]:
    """The node after `event`.

    Raises:
        InvalidTransition: presence of a node that never joined.
    """
    match event:
        case NodeJoined(node=name, region=region, capabilities=capabilities):
            return Node(name, region, capabilities, True, at), (AnnouncePresence(name, "online"),)
        case NodeOnline(node=name):
            if state is None:
                raise InvalidTransition(f"node {name} came online without having joined")
            return replace(state, online=True, since=at, reason=""), (AnnouncePresence(name, "online"),)
        case NodeOffline(node=name, reason=reason):
            if state is None:
                raise InvalidTransition(f"node {name} went offline without having joined")
            return replace(state, online=False, since=at, reason=reason), (AnnouncePresence(name, reason),)


def matches(node: Node, selector: Mapping[str, str]) -> bool:
    labels = node.labels
    return all(labels.get(key) in value.split("|") for key, value in selector.items())
