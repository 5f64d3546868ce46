"""Who may report what. The broker guarantees a report's subject, so its content must match that. Pure."""

from __future__ import annotations

from fedtide.fabric.events.envelope import DriftReported, EventData, ModelProduced, NodeJoined, ReleasePublished
from fedtide.fabric.events.identity import OrderRefused
from fedtide.fabric.events.rollouts import NodeMeasured, NodePhaseReported
from fedtide.fabric.nats.subjects import COLLECTOR, HUB_REGION, Report

IMPORT = "import"
"""The sender of releases that were made elsewhere and imported; it has a coordinator's credentials."""


def why_refused(sender: Report, data: EventData) -> str | None:
    """Why `sender` may not report `data`, or None."""
    region, who = sender.region, sender.node
    if isinstance(data, ReleasePublished):
        return None if (region, who) == (HUB_REGION, IMPORT) else _foreign(who, data.kind)
    if region == HUB_REGION:
        run = getattr(data, "run", None)
        produced = isinstance(data, ModelProduced)
        return None if (produced or data.kind.split(".")[0] in _OF_RUNS) and run == who else _foreign(who, data.kind)
    if who == COLLECTOR:
        fits = isinstance(data, DriftReported) and data.region == region and not data.node
        return None if fits else _foreign(f"the collector of {region}", data.kind)
    match data:
        case NodeJoined(node=node, region=theirs):
            return None if (node, theirs) == (who, region) else _foreign(who, f"{data.kind} of {node}")
        case NodePhaseReported(node=node) | NodeMeasured(node=node) | OrderRefused(node=node):
            return None if node == who else _foreign(who, f"{data.kind} of {node}")
        case _:
            return _foreign(who, data.kind)


_OF_RUNS = ("run", "round", "rounds", "aggregator", "update")


def _foreign(who: str, what: str) -> str:
    return f"{who} may not report {what}"
