"""Writes what the documentation says about types: settings, policies, state machines, metrics.

A page marks where: `<!-- generated: NAME -->` ... `<!-- end -->`. Run by `make docs`; a test compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import chart_values
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedtide.aggregation.folding.fold_worker import FoldWorkerConfig
from fedtide.coordinator.api.metrics import Timings, WorldMetrics
from fedtide.coordinator.api.process_metrics import ProcessMetrics
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.rollouts import rollouts, waves
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.state import World
from fedtide.coordinator.transitions import Transition
from fedtide.edge_agent.config import AgentConfig, DriftLimits
from fedtide.edge_agent.serving.node_metrics import NodeMetrics, NodeState
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans import rollout_plan as plan
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.round_policy import RoundPolicy, Selection, StopRule
from fedtide.fabric.plans.trigger_rule import TriggerRule

HERE = Path(__file__).parent
CHARTS = {name: HERE.parent / "deploy" / name for name in ("cloud/fedtide", "k3s/fedtide-edge")}
_PART = re.compile(r"<!-- generated: (?P<name>[a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)


def settings(kind: type[BaseModel], prefix: str = "", inner: frozenset[str] = frozenset()) -> str:
    """A table of a model's fields; those of the fields named in `inner` are listed as `field.name`."""
    rows = ["| field | default | is |", "|---|---|---|"]
    return "\n".join([*rows, *_rows(kind, prefix, inner)])


def _rows(kind: type[BaseModel], prefix: str, inner: frozenset[str]) -> Iterator[str]:
    for name, info in kind.model_fields.items():
        model = _model_of(info.annotation)
        if name in inner and model is not None:
            yield from _rows(model, f"{prefix}{name}.", frozenset())
        elif name != "kind":
            yield f"| `{prefix}{name}` | {_default(info)} | {_meaning(info)} |"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value == "" or isinstance(value, BaseModel):
        return ""
    plain = TypeAdapter(Any).dump_python(value, mode="json", exclude_defaults=True)
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


def _meaning(info: FieldInfo) -> str:
    choices = " \\| ".join(f"`{c}`" for c in _choices(info.annotation))
    limits = ", ".join(_limits(info))
    text = info.description or ""
    return "; ".join(part for part in (text, choices, limits) if part)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return []


def _limits(info: FieldInfo) -> Iterator[str]:
    names = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for limit in info.metadata:
        for name, words in names.items():
            if (value := getattr(limit, name, None)) is not None:
                yield f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def gates() -> str:
    """The gates of a roll-out, with what each takes."""
    (union, *_) = get_args(plan.Gate) if get_origin(plan.Gate) is Annotated else (plan.Gate,)
    rows = ["| kind | passes by | takes |", "|---|---|---|"]
    for kind in get_args(union):
        fields = [f"`{n}` {_default(i)}".strip() for n, i in kind.model_fields.items() if n != "kind"]
        rows.append(f"| `{kind.model_fields['kind'].default}` | {_first_line(kind)} | {', '.join(fields)} |")
    return "\n".join(rows)


def _first_line(kind: type) -> str:
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())


def diagram(transitions: Iterable[Transition]) -> str:
    """A state machine, drawn by mermaid."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for change in transitions:
        before = "[*]" if change.before is None else change.before.__name__
        lines.append(f"    {before} --> {change.after.__name__}: {change.why}")
    return "\n".join([*lines, "```"])


def actions(table: Any) -> str:
    """In which states a person may do what."""
    rows = ["| action | in |", "|---|---|"]
    for action, states in table.items():
        rows.append(f"| `{action}` | {', '.join(sorted(state.__name__ for state in states))} |")
    return "\n".join(rows)


def metrics() -> str:
    """What `/metrics` shows, from the collector itself over an empty world."""

    class Empty:
        """Of those that it asks no more is read than this."""

        world, applied, refused, left_out, parked, count = World(), 0, 0, (), (), 0
        levels, clock_ahead_s, twins, dropped = {}, {}, {}, 0

    rows = ["| metric | type | is |", "|---|---|---|"]
    empty: Any = Empty()
    registry = CollectorRegistry()
    registry.register(WorldMetrics(empty, empty, empty, empty, empty))
    Timings(empty, registry, traced=False)
    ProcessMetrics(empty, registry)
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


def node_metrics() -> str:
    """As `metrics`, of a node."""
    state = NodeState(ready=True, connected=True, training=False, used=Usage())
    serving: Any = type("Empty", (), {"serving": dict})()
    rows = ["| metric | type | is |", "|---|---|---|"]
    for family in NodeMetrics(serving, lambda: state).registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {
    "agent-settings": lambda: settings(AgentConfig, inner=frozenset({"capture", "drift", "limits", "packages"})),
    "collector-settings": lambda: settings(DriftLimits, "limits."),
    "coordinator-settings": lambda: settings(
        CoordinatorConfig, inner=frozenset({"kubernetes", "packages", "traces", "tracking"})
    ),
    "fold-worker-settings": lambda: settings(FoldWorkerConfig),
    "selection": lambda: settings(Selection),
    "round-policy": lambda: settings(RoundPolicy),
    "stop-rule": lambda: settings(StopRule),
    "rollout-plan": lambda: settings(RolloutRequest, inner=frozenset({"bake", "rate"})),
    "gates": gates,
    "trigger-rule": lambda: settings(TriggerRule, inner=frozenset({"schedule"})),
    "run-states": lambda: diagram(runs.TRANSITIONS),
    "run-actions": lambda: actions(runs.ACTIONS),
    "round-states": lambda: diagram(rounds.TRANSITIONS),
    "rollout-states": lambda: diagram(rollouts.TRANSITIONS),
    "rollout-actions": lambda: actions(rollouts.ACTIONS),
    "wave-states": lambda: diagram(waves.TRANSITIONS),
    "metrics": metrics,
    "node-metrics": node_metrics,
    "cloud-values": lambda: chart_values.table(CHARTS["cloud/fedtide"] / "values.yaml"),
    "edge-values": lambda: chart_values.table(CHARTS["k3s/fedtide-edge"] / "values.yaml"),
}


def files() -> dict[Path, str]:
    """All files that are generated, whole or in parts, as they should be."""
    pages = [*sorted(HERE.glob("*.md")), *(chart / "README.md" for chart in CHARTS.values())]
    schemas = {chart / "values.schema.json": chart_values.schema(chart / "values.yaml") for chart in CHARTS.values()}
    return {page: generated(page.read_text(encoding="utf-8")) for page in pages} | schemas


def generated(text: str) -> str:
    """A page with its generated parts as they should be; raises KeyError for a part that does not exist."""

    def part(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return _PART.sub(part, text)


def main() -> int:
    for file, now in files().items():
        if now != file.read_text(encoding="utf-8"):
            file.write_text(now, encoding="utf-8")
            print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
