"""Which nodes a round asks: eligible ones, the least burdened first, then as the run prefers. Pure.

The same world and seed give the same nodes: after a replay, in another process, on another day.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fedtide.coordinator.fleet.fleet import Node, matches
from fedtide.fabric.messages import protocol
from fedtide.fabric.messages.heartbeat import Capabilities
from fedtide.fabric.packages.requirements import lacking
from fedtide.fabric.plans.round_policy import Selection
from fedtide.fabric.plans.run_spec import AppRef, RunSpec

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Asking:
    """The phase that nodes are wanted for."""

    run: str
    round: int
    trial: int
    phase: str


def choose(
    nodes: Iterable[Node],
    spec: RunSpec,
    asking: Asking,
    busy: Mapping[str, int],
    last_asked: Mapping[str, datetime],
    share: float = 1.0,
    least: int = 0,
) -> list[Node]:
    """The nodes to ask in one phase, sorted by partition and name.

    Args:
        busy: how many tasks of other runs each node has; idle nodes are asked first, so that runs share a fleet.
        last_asked: when each node was asked to train last.
        share: of the nodes that would be asked, so many are (at least one, and at least `least`).
    """
    selection = spec.selection
    eligible = [n for n in nodes if why_not(n, spec) is None and not (selection.idle and busy.get(n.name))]

    def rank(node: Node) -> tuple[int, float | datetime, str]:
        chance = _chance(selection.seed, asking, node.name)
        match selection.prefer:
            case "least_recent":
                return busy.get(node.name, 0), last_asked.get(node.name, _NEVER), chance
            case "most_samples":
                return busy.get(node.name, 0), -float(node.capabilities.samples or 0), chance
            case "random":
                return busy.get(node.name, 0), 0.0, chance

    whole = _count(selection, len(eligible), asking.phase)
    count = min(whole, max(math.ceil(share * whole), least))
    chosen = sorted(eligible, key=rank)[:count]
    return sorted(chosen, key=_partition_then_name)


def why_not(node: Node, spec: RunSpec) -> str | None:
    """Why a node takes no part in a run now, or None."""
    capabilities, selection = node.capabilities, spec.selection
    missing = sorted(set(selection.needs) - set(capabilities.extras))
    if not node.online:
        return f"offline: {node.reason}"
    if node.quarantined:
        return f"is quarantined: {node.quarantined}"
    if not capabilities.schedulable:
        return "is cordoned or being drained"
    if (reason := protocol.why_not(capabilities.protocol)) is not None:
        return reason
    if not matches(node, spec.selector):
        return f"does not have the labels {spec.selector}"
    if missing:
        return f"has no {', '.join(missing)}"
    if (reason := why_not_packages(capabilities, spec.app)) is not None:
        return reason
    if selection.min_samples > (capabilities.samples or 0):
        return f"counts {capabilities.samples or 0} samples, wanted are {selection.min_samples}"
    if selection.min_memory_bytes > capabilities.memory_bytes:
        return f"has {capabilities.memory_bytes} bytes of memory, wanted are {selection.min_memory_bytes}"
    return None


def why_not_packages(capabilities: Capabilities, app: AppRef) -> str | None:
    """Why a node has not what an app needs, and cannot get it, or None.

    Only what is sure: what else a node lacks it says itself, when it is asked to train.
    """
    if not app.requirements or capabilities.packages is None or "index" in capabilities.installs:
        return None
    if app.wheels and "wheels" in capabilities.installs:
        return None
    lacks = ", ".join(lacking(app.requirements, capabilities.packages))
    return f"has no {lacks}, which the app needs, and may not install it" if lacks else None


def _count(selection: Selection, eligible: int, phase: str) -> int:
    if selection.nodes is None and selection.fraction is None:
        return eligible
    wanted = selection.nodes if selection.nodes is not None else max(1, round((selection.fraction or 1) * eligible))
    factor = selection.over_provision if phase == "train" else 1.0
    return min(eligible, math.ceil(wanted * factor))


def _chance(seed: int, asking: Asking, node: str) -> str:
    text = f"{seed}/{asking.run}/{asking.round}/{asking.trial}/{asking.phase}/{node}"
    return hashlib.sha256(text.encode()).hexdigest()


def _partition_then_name(node: Node) -> tuple[int, str]:
    partition = node.capabilities.node_config.get("partition-id")
    return (partition if isinstance(partition, int) else 1 << 62, node.name)
