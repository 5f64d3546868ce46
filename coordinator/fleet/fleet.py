"""The fleet: nodes, what they can do, and whether they are online. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from fedtide.coordinator.commands import AnnouncePresence, Commands
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.envelope import NodeJoined, NodeOffline, NodeOnline
from fedtide.fabric.events.identity import NodeQuarantined, OrderRefused
from fedtide.fabric.messages.heartbeat import Capabilities

NodeEvent = NodeJoined | NodeOnline | NodeOffline | OrderRefused | NodeQuarantined


@dataclass(frozen=True, slots=True)
class Node:
    """`reason` says why it is offline; `since` is when `online` last changed.

    `refused`: how often it did not follow what came, by why. `quarantined`: why it is not asked to train; empty: it is.
    """

    name: str
    region: str
    capabilities: Capabilities
    online: bool
    since: datetime
    reason: str = ""
    refused: Mapping[str, int] = field(default_factory=dict)
    quarantined: str = ""

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
            joined = Node(name, region, capabilities, True, at)
            if state is not None:
                joined = replace(joined, refused=state.refused, quarantined=state.quarantined)
            return joined, (AnnouncePresence(name, "online"),)
        case NodeOnline(node=name):
            if state is None:
                raise InvalidTransition(f"node {name} came online without having joined")
            return replace(state, online=True, since=at, reason=""), (AnnouncePresence(name, "online"),)
        case NodeOffline(node=name, reason=reason):
            if state is None:
                raise InvalidTransition(f"node {name} went offline without having joined")
            return replace(state, online=False, since=at, reason=reason), (AnnouncePresence(name, reason),)
        case OrderRefused() | NodeQuarantined():
            if state is None:
                raise InvalidTransition(f"{event.kind} of a node {event.node} that never joined")
            return _told(state, event), ()


def _told(state: Node, event: OrderRefused | NodeQuarantined) -> Node:
    if isinstance(event, OrderRefused):
        return replace(state, refused={**state.refused, event.refusal: state.refused.get(event.refusal, 0) + 1})
    return replace(state, quarantined="" if event.lifted else event.reason or "no reason was given")


def matches(node: Node, selector: Mapping[str, str]) -> bool:
    labels = node.labels
    return all(labels.get(key) in value.split("|") for key, value in selector.items())
