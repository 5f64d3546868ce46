"""Live views of runs and roll-outs: redrawn on a terminal, one line a change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from coordinator.cli.output import megabytes

View = dict[str, Any]


def follow(views: Iterable[View], draw: Callable[[View], RenderableType], lines: Callable[[View], list[str]]) -> View:
    """Show every view as it comes; returns the last one."""
    last: View = {}
    if sys.stdout.isatty():
        with Live(console=Console(), auto_refresh=False) as live:
            for last in views:
                live.update(draw(last), refresh=True)
        return last
    shown: list[str] = []
    for last in views:
        for line in lines(last):
            if line not in shown:
                shown.append(line)
                typer.echo(line)
    return last


def draw_run(view: View) -> RenderableType:
    title = f"{view['run']}  {view['app']}  {view['state']}" + (f"  {view['reason']}" if view["reason"] else "")
    table = Table(
        "round", "state", "nodes", "accuracy", "loss", "up", "down", "seconds", title=title, title_justify="left"
    )
    for each in view["rounds"]:
        table.add_row(*round_cells(each))
    return Group(table, *[Text(line, style="yellow") for line in refusals(view)])


def round_cells(each: View) -> list[str]:
    train = each["phases"].get("train", {})
    nodes = f"{len(train.get('received', []))}/{train.get('asked', 0)}"
    return [
        str(each["round"]),
        each["state"],
        nodes,
        _metric(each, "accuracy"),
        _metric(each, "loss"),
        megabytes(each["bytes_up"]),
        megabytes(each["bytes_down"]),
        "-" if each["seconds"] is None else f"{each['seconds']:.1f}",
    ]


def _metric(each: View, name: str) -> str:
    metrics = each["metrics"]
    for key in (name, f"eval_{name}", f"eval_{name[:3]}", f"train_{name}"):
        if metrics.get(key) is not None:
            return f"{metrics[key]:.4f}"
    return "-"


def refusals(view: View) -> list[str]:
    """One line for each answer that did not count."""
    lines = []
    for each in view["rounds"]:
        for phase, tally in each["phases"].items():
            for node, refused in tally["refused"].items():
                first = refused["reason"].partition("\n")[0]
                lines.append(f"round {each['round']} {phase} {node}: {refused['category']}: {first}")
    return lines


def run_lines(view: View) -> list[str]:
    closed = [each for each in view["rounds"] if each["state"] == "closed"]
    rows = [
        "round {} {}  nodes {}  accuracy {}  loss {}  up {}  down {}  {} s".format(*round_cells(each))
        for each in closed
    ]
    state = f"{view['run']} {view['state']}" + (f": {view['reason']}" if view["reason"] else "")
    return [*refusals(view), *rows, state]


def draw_rollout(view: View) -> RenderableType:
    tree = Tree(rollout_title(view))
    for region in view["regions"]:
        branch = tree.add(region_line(region))
        for node, reason in region["reasons"].items():
            branch.add(Text(f"{node}: {reason}", style="yellow"))
    return tree


def rollout_title(view: View) -> str:
    title = f"{view['rollout']}  {view['model']} v{view['version']}  {view['state']}"
    return f"{title}  {view['reason']}" if view["reason"] else title


def region_line(region: View) -> str:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(region["phases"].items())) or "waiting"
    return f"{region['region']}: {region['nodes']} nodes, {phases}"


def rollout_lines(view: View) -> list[str]:
    reasons = [f"  {n}: {r}" for region in view["regions"] for n, r in region["reasons"].items()]
    return [rollout_title(view), *[region_line(r) for r in view["regions"] if r["phases"]], *reasons]
