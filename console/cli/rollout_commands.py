"""`fedtide rollout ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fedtide.console import endpoints
from fedtide.console.cli import grammar
from fedtide.console.cli.rule_files import read, validate
from fedtide.console.cli.run_commands import Watch
from fedtide.console.cli.verbs import shows
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, Timeout, console, megabytes, say, show_list, show_one
from fedtide.fabric.errors import ConfigError, TransientError
from fedtide.fabric.messages.requests import RolloutActionName
from fedtide.fabric.messages.views import ROLLOUT_OPEN, PlannedRollout, RolloutState, RolloutView
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.validation import checked

rollouts_app = typer.Typer(no_args_is_help=True, help="Roll releases out, region by region.")

Model = Annotated[str, typer.Argument(help="Or the path of a plan, a YAML file with the fields of docs/rollouts.md")]
Version = Annotated[int | None, typer.Option("--version", min=1, help="Default: the latest release")]
Regions = Annotated[str, typer.Option("--regions", help="In this order, e.g. eu,us+ap,sa: us and ap go together")]
Nodes = Annotated[str, typer.Option("--nodes", help="Labels a node must have")]
Canary = Annotated[float | None, typer.Option(min=0, help="Below 1 a share of each wave, else a number of nodes")]
MaxError = Annotated[float | None, typer.Option(min=0, max=1, help="Failed / attempted")]
MinSuccess = Annotated[float | None, typer.Option(min=0, max=1, help="Confirmed / attempted")]
Claim = Annotated[float | None, typer.Option("--claim-deadline", min=0.1, help="Seconds a node has to answer")]
Bake = Annotated[float | None, typer.Option("--bake", min=0, help="Seconds that canaries are watched")]
OnFailure = Annotated[str | None, typer.Option("--on-failure", help="pause, rollback_wave or rollback_all")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any field of a plan: key=value (YAML); repeat")]


@rollouts_app.command("plan", help="What a roll-out would do: nodes, bytes over the links, time. Changes nothing.")
@rollouts_app.command("start", help="Start a roll-out: canaries of the first region, the rest of it, then the next.")
def plan_or_start(
    context: typer.Context,
    model: Model,
    version: Version = None,
    regions: Regions = "",
    nodes: Nodes = "",
    canary: Canary = None,
    max_error: MaxError = None,
    min_success: MinSuccess = None,
    claim_deadline: Claim = None,
    bake: Bake = None,
    on_failure: OnFailure = None,
    settings: Settings = None,
    watch: Watch = False,
    output: Output = Format.table,
) -> None:
    given: dict[str, Any] = {
        "version": version,
        "regions": [r.split("+") if "+" in r else r for r in regions.split(",") if r] or None,
        "selector": grammar.labels("--nodes", nodes) or None,
        "canary": canary,
        "max_error": max_error,
        "min_success": min_success,
        "claim_deadline_s": claim_deadline,
        "bake": None if bake is None else {"seconds": bake},
        "on_failure": on_failure,
    }
    given = {key: value for key, value in given.items() if value is not None}
    given |= {key: grammar.value("--set", key, text) for key, text in grammar.pairs("--set", settings or [])}
    asked = _request(model, given)
    client = Client.find()
    if context.info_name == "plan":
        _show_plan(client.send(endpoints.plan_rollout(asked)), output)
        return
    view = client.send(endpoints.start_rollout(asked))
    if watch:
        _follow(client, view.rollout, output)
    elif output is Format.table:
        say(f"{view.rollout} started. Follow it: fedtide rollout watch {view.rollout}")
    else:
        show_one(view, output)


def _request(model: str, given: dict[str, Any]) -> RolloutRequest:
    if not model.endswith((".yaml", ".yml")):
        return checked(RolloutRequest, {"model": model, **given})
    documents = read(Path(model))
    if len(documents) != 1:
        raise ConfigError(model, f"holds {len(documents)} documents", "Write one plan into a file")
    document, node = documents[0]
    planned = validate(Path(model), document, node, RolloutRequest)
    return checked(RolloutRequest, {**planned.model_dump(exclude_unset=True), **given}) if given else planned


def _show_plan(view: PlannedRollout, output: Format) -> None:
    if output is not Format.table:
        show_one(view, output)
        return
    say(
        f"{view.model} v{view.version} to {view.nodes} nodes: {megabytes(view.wan_bytes)} over the links, "
        f"{megabytes(view.bytes_per_node)} a node at most, at least {view.at_least_seconds:g} s"
    )
    rows = [
        {
            "group": r.group,
            "region": r.region,
            "nodes": len(r.nodes),
            "canaries": r.canaries,
            "offline": r.offline,
            "wan": megabytes(r.wan_bytes),
            "approval": "waits" if r.approval else "-",
        }
        for r in view.regions
    ]
    show_list([], rows, output)


@rollouts_app.command("ls")
def ls(
    state: Annotated[RolloutState | None, typer.Option("--state", help="Only roll-outs in this state")] = None,
    model: Annotated[str, typer.Option("--model", help="Only roll-outs of this model")] = "",
    limit: Limit = 1000,
    output: Output = Format.table,
) -> None:
    """All roll-outs, oldest first."""
    listing = endpoints.rollouts(state=state, model=model)
    views = list(Client.find().every(listing, limit))
    show_list(views, [_row(view) for view in views], output)


def _row(view: RolloutView) -> dict[str, Any]:
    return {
        **view.model_dump(include={"rollout", "model", "version", "state"}),
        "regions": [f"{w.region} {w.confirmed}/{w.nodes}" for w in view.regions],
        "started_at": view.started_at,
        "reason": view.reason,
    }


@shows(rollouts_app)
def show(rollout: str, watch: Watch = False, output: Output = Format.table) -> None:
    """One roll-out: its regions, gates and node phases, the reason first."""
    client = Client.find()
    if watch:
        _follow(client, rollout, output)
        return
    view = client.send(endpoints.rollout(rollout))
    if output is not Format.table:
        show_one(view, output)
        return
    from fedtide.console.watching import draw_rollout

    console().print(draw_rollout(view))


@rollouts_app.command("watch")
def watch_rollout(rollout: str, output: Output = Format.table) -> None:
    """Follow a roll-out to its end; exit code 1 if it does not complete (`-o json`: one view a line)."""
    _follow(Client.find(), rollout, output)


@rollouts_app.command("wait")
def wait(
    rollout: str,
    state: Annotated[str, typer.Option("--for", help="A state (completed, paused, ...), or region=R")] = "completed",
    timeout: Timeout = 3600.0,
) -> None:
    """Wait until a roll-out, or its wave in a region, is in a state. Exit code 1: it ended otherwise; 75: timeout."""
    kind, _, region = state.partition("=")
    if kind != "region" and state not in get_args(RolloutState):
        known = ", ".join(get_args(RolloutState))
        raise ConfigError("--for", f"{state!r} is no state", f"Use one of {known}, or region=R")
    watch = endpoints.watch_rollout(rollout, through_pauses=True)
    for view in Client.find().stream(watch, timeout_s=timeout):
        waves = {r.region: r.state for r in view.regions}
        if kind == "region" and region not in waves:
            raise ConfigError("--for", f"{region!r} is not in this roll-out", f"It has {', '.join(waves)}")
        arrived = view.state == state or (kind == "region" and waves[region] == "over")
        if arrived or view.state not in ROLLOUT_OPEN:
            say(f"{rollout} {view.state}: {view.reason}")
            raise typer.Exit(0 if arrived else 1)
    raise TransientError(f"{rollout} is not {state} after {timeout:g} s", f"See `fedtide rollout show {rollout}`")


Reason = Annotated[str, typer.Option("--reason", help="Why; shown to whoever looks")]


@rollouts_app.command("pause")
def pause(rollout: str, reason: Reason = "", output: Output = Format.table) -> None:
    """Pause a roll-out: no more offers and decisions. Errors still take the release back."""
    _act(rollout, "pause", output, reason)


@rollouts_app.command("resume")
def resume(rollout: str, output: Output = Format.table) -> None:
    """Resume a paused roll-out; the cause of its pause is evaluated again."""
    _act(rollout, "resume", output)


@rollouts_app.command("promote")
def promote(
    rollout: str,
    region: Annotated[str, typer.Option("--region", help="Default: all that wait")] = "",
    output: Output = Format.table,
) -> None:
    """Promote a wave that waits for its approval, bake time or gates."""
    _act(rollout, "promote", output, region=region)


@rollouts_app.command("abort")
def abort(rollout: str, reason: Reason = "", output: Output = Format.table) -> None:
    """Stop a roll-out and take the release back from every node that was offered it."""
    _act(rollout, "abort", output, reason)


@rollouts_app.command("rollback")
def rollback(rollout: str, reason: Reason = "", output: Output = Format.table) -> None:
    """Take the release back from every node, also when the roll-out is completed."""
    _act(rollout, "rollback", output, reason)


@rollouts_app.command("next")
def next_group(rollout: str, output: Output = Format.table) -> None:
    """Start the next group of regions now, in parallel with the current one."""
    _act(rollout, "next", output)


@rollouts_app.command("retry")
def retry(rollout: str, output: Output = Format.table) -> None:
    """Offer the release again to nodes that failed or never took it."""
    _act(rollout, "retry", output)


def _act(rollout: str, action: RolloutActionName, output: Format, reason: str = "", region: str = "") -> None:
    view = Client.find().send(endpoints.act_on_rollout(rollout, action, reason, region))
    if output is Format.table:
        say(f"{rollout} {view.state}" + (f": {view.reason}" if view.reason else ""))
    else:
        show_one(view, output)


def _follow(client: Client, rollout: str, output: Format) -> None:
    from fedtide.console.watching import draw_rollout, follow, rollout_lines

    views = client.stream(endpoints.watch_rollout(rollout))
    last = follow(views, draw_rollout, rollout_lines, json=output is not Format.table)
    if last is None or last.state != "completed":
        raise typer.Exit(1)
