"""Live views of runs and roll-outs: redrawn on a terminal, one line a change elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from pydantic import BaseModel
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from fedtide.console.output import can_redraw, console, megabytes, say
from fedtide.fabric.messages.views import GateView, PhaseView, RolloutView, RoundView, RunView, WaveView

V = TypeVar("V", bound=BaseModel)

SHOWN_ROUNDS = 12
SHOWN_NODES = 10
_COLOURS = {"pass": "green", "fail": "red", "error": "red"}


def follow(
    views: Iterable[V], draw: Callable[[V], RenderableType], lines: Callable[[V], list[str]], *, json: bool = False
) -> V | None:
    """Show every view as it comes; returns the last one. As JSON: one view a line."""
    last: V | None = None
    if json:
        for last in views:
            say(last.model_dump_json())
        return last
    if can_redraw():
        with Live(console=console(), auto_refresh=False) as live:
            for last in views:
                live.update(draw(last), refresh=True)
        return last
    shown: list[str] = []
    for last in views:
        for line in lines(last):
            if line not in shown:
                shown.append(line)
                say(line)
    return last


def draw_run(view: RunView) -> RenderableType:
    """A tree: the run with its reason, its rounds, and in an open round the nodes by what they do."""
    tree = Tree(Text(run_title(view)))
    hidden = max(0, len(view.rounds) - SHOWN_ROUNDS)
    if hidden:
        tree.add(Text(f"{hidden} earlier rounds"))
    for each in view.rounds[hidden:]:
        branch = tree.add(Text(round_line(each)))
        for phase, tally in each.phases.items():
            if each.state != "closed":
                branch.add(Text(f"{phase}: {', '.join(f'{count} {name}' for name, count in tally.states.items())}"))
            for line in refusals_of(each.round, phase, tally):
                branch.add(Text(line, style="yellow"))
    return tree


def run_title(view: RunView) -> str:
    title = f"{view.run}  {view.app}  {view.state}"
    return f"{title}  {view.reason}" if view.reason else title


def round_line(each: RoundView) -> str:
    if each.state == "closed":
        return "round {} {}  nodes {}  accuracy {}  loss {}  up {}  down {}  {} s".format(*round_cells(each))
    trial = f" (trial {each.trial})" if each.trial > 1 else ""
    return f"round {each.round}{trial} {each.state}  {each.reason}"


def round_cells(each: RoundView) -> list[str]:
    asked = each.phases.get("train") or next(iter(each.phases.values()), None)
    nodes = f"{len(asked.received)}/{asked.asked}" if asked is not None else "0/0"
    return [
        str(each.round),
        each.state,
        nodes,
        _metric(each, "accuracy"),
        _metric(each, "loss"),
        megabytes(each.bytes_up),
        megabytes(each.bytes_down),
        "-" if each.seconds is None else f"{each.seconds:.1f}",
    ]


def _metric(each: RoundView, name: str) -> str:
    for key in (name, f"eval_{name}", f"eval_{name[:3]}", f"train_{name}"):
        if (value := each.metrics.get(key)) is not None:
            return f"{value:.4f}"
    return "-"


def refusals_of(number: int, phase: str, tally: PhaseView) -> list[str]:
    """One line for each answer that did not count."""
    return [
        f"round {number} {phase} {node}: {refused.category}: {refused.reason.partition(chr(10))[0]}"
        for node, refused in tally.refused.items()
    ]


def run_lines(view: RunView) -> list[str]:
    phases = [(each.round, phase, tally) for each in view.rounds for phase, tally in each.phases.items()]
    refused = [line for each in phases for line in refusals_of(*each)]
    rows = [round_line(each) for each in view.rounds if each.state in ("closed", "abandoned")]
    state = f"{view.run} {view.state}" + (f": {view.reason}" if view.reason else "")
    return [*refused, *rows, state]


def draw_rollout(view: RolloutView) -> RenderableType:
    tree = Tree(Text(rollout_title(view)))
    for region in view.regions:
        branch = tree.add(Text(region_line(region)))
        for gate in region.gates:
            branch.add(Text(gate_line(gate), style=_COLOURS.get(gate.outcome, "yellow")))
        for node, reason in list(region.reasons.items())[:SHOWN_NODES]:
            branch.add(Text(f"{node}: {reason}", style="yellow"))
        if (hidden := len(region.reasons) - SHOWN_NODES) > 0:
            branch.add(Text(f"{hidden} more nodes with a reason: -o json"))
    return tree


def rollout_title(view: RolloutView) -> str:
    title = f"{view.rollout}  {view.model} v{view.version}  {view.state}"
    return f"{title}  {view.reason}" if view.reason else title


def region_line(region: WaveView) -> str:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(region.phases.items())) or "waiting"
    wan = f", {megabytes(region.wan_bytes)} over the link" if region.wan_bytes else ""
    return f"{region.region}: {region.state}, {region.nodes} nodes, {phases}{wan}"


def gate_line(gate: GateView) -> str:
    return f"{gate.outcome}{'' if gate.enforced else ' (not enforced)'}  {gate.reason}"


def rollout_lines(view: RolloutView) -> list[str]:
    reasons = [f"  {n}: {r}" for region in view.regions for n, r in region.reasons.items()]
    gates = [f"  {r.region}: {gate_line(g)}" for r in view.regions for g in r.gates]
    return [rollout_title(view), *[region_line(r) for r in view.regions if r.phases], *gates, *reasons]
