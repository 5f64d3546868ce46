"""`fedtide rollout ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from coordinator.cli.client import Client
from coordinator.cli.output import Format, Output, show_list, show_one
from coordinator.cli.run_commands import Watch, parse_labels

rollouts_app = typer.Typer(no_args_is_help=True, help="Roll releases out, region by region.")


@rollouts_app.command("start")
def start(
    model: str,
    version: Annotated[int | None, typer.Option("--version", min=1, help="Default: the latest release")] = None,
    regions: Annotated[str, typer.Option("--regions", help="In this order; default: all, by name")] = "",
    nodes: Annotated[str, typer.Option("--nodes", help="Labels a node must have")] = "",
    canary: Annotated[float, typer.Option("--canary", min=0, max=1, help="Share of the first wave")] = 0.34,
    max_error: Annotated[float, typer.Option("--max-error", min=0, max=1, help="Failed / attempted")] = 0.0,
    min_success: Annotated[float | None, typer.Option(min=0, max=1, help="Confirmed / attempted")] = None,
    deadline: Annotated[float, typer.Option("--claim-deadline", min=0.1, help="Seconds a wave waits")] = 300.0,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    """Start a roll-out: canaries of the first region, the rest of it, then region after region."""
    client = Client.find()
    request = {
        "model": model,
        "version": version,
        "regions": [r for r in regions.split(",") if r],
        "selector": parse_labels(nodes),
        "canary": canary,
        "max_error": max_error,
        "min_success": min_success,
        "claim_deadline_s": deadline,
    }
    view = client.post("/v1/rollouts", request)
    if watch:
        _follow(client, view["rollout"])
    elif output is Format.table:
        typer.echo(f"{view['rollout']} started. Follow it: fedtide rollout watch {view['rollout']}")
    else:
        show_one(view, output)


@rollouts_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All roll-outs."""
    rows = Client.find().get("/v1/rollouts")
    if output is Format.table:
        rows = [{**r, "regions": [f"{w['region']} {w['confirmed']}/{w['nodes']}" for w in r["regions"]]} for r in rows]
    show_list(rows, ["rollout", "model", "version", "state", "regions", "started_at", "reason"], output)


@rollouts_app.command("show")
def show(rollout: str, output: Output = Format.table) -> None:
    """One roll-out."""
    show_one(Client.find().get(f"/v1/rollouts/{rollout}"), output)


@rollouts_app.command("watch")
def watch_rollout(rollout: str) -> None:
    """Follow a roll-out to its end; exit code 1 if it does not complete."""
    _follow(Client.find(), rollout)


@rollouts_app.command("abort")
def abort(rollout: str) -> None:
    """Stop a roll-out and take the release back from every node that was offered it."""
    view = Client.find().post(f"/v1/rollouts/{rollout}/abort", {})
    typer.echo(f"{rollout} {view['state']}: {view['reason']}")


def _follow(client: Client, rollout: str) -> None:
    from coordinator.cli.watching import draw_rollout, follow, rollout_lines

    last = follow(client.stream(f"/v1/rollouts/{rollout}/watch"), draw_rollout, rollout_lines)
    if last.get("state") != "completed":
        raise typer.Exit(1)
