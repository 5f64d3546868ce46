"""`fedtide rollout ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from fedtide.console.cli.output import Format, Output, megabytes, show_list, show_one
from fedtide.console.cli.rule_files import read
from fedtide.console.cli.run_commands import Watch, parse_labels
from fedtide.console.client import Client
from fedtide.fabric.errors import ConfigError, TransientError

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
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any field of a plan: key=YAML; repeat")]


def _from_file(file: Path) -> dict[str, Any]:
    documents = read(file)
    if len(documents) != 1:
        raise ConfigError(str(file), f"holds {len(documents)} documents", "Write one plan into a file")
    return documents[0][0]


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
    client = Client.find()
    request = _from_file(Path(model)) if model.endswith((".yaml", ".yml")) else {"model": model}
    told: dict[str, Any] = {
        "version": version,
        "regions": [r.split("+") if "+" in r else r for r in regions.split(",") if r] or None,
        "selector": parse_labels(nodes) or None,
        "canary": canary,
        "max_error": max_error,
        "min_success": min_success,
        "claim_deadline_s": claim_deadline,
        "bake": None if bake is None else {"seconds": bake},
        "on_failure": on_failure,
    }
    request |= {key: value for key, value in told.items() if value is not None}
    request |= dict(_setting(text) for text in settings or [])
    if context.info_name == "plan":
        _show_plan(client.post("/v1/rollouts/plan", request), output)
        return
    view = client.post("/v1/rollouts", request)
    if watch:
        _follow(client, view["rollout"])
    elif output is Format.table:
        typer.echo(f"{view['rollout']} started. Follow it: fedtide rollout watch {view['rollout']}")
    else:
        show_one(view, output)


def _show_plan(view: dict[str, Any], output: Format) -> None:
    if output is not Format.table:
        show_one(view, output)
        return
    typer.echo(
        f"{view['model']} v{view['version']} to {view['nodes']} nodes: {megabytes(view['wan_bytes'])} over the links, "
        f"{megabytes(view['bytes_per_node'])} a node at most, at least {view['at_least_seconds']:g} s"
    )
    rows = [
        {**r, "nodes": len(r["nodes"]), "wan": megabytes(r["wan_bytes"]), "approval": "waits" if r["approval"] else "-"}
        for r in view["regions"]
    ]
    show_list(rows, ["group", "region", "nodes", "canaries", "offline", "wan", "approval"], output)


def _setting(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"--set {text}", "is not key=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {key}", "is not YAML") from exc


@rollouts_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All roll-outs."""
    rows = Client.find().get("/v1/rollouts")
    if output is Format.table:
        rows = [{**r, "regions": [f"{w['region']} {w['confirmed']}/{w['nodes']}" for w in r["regions"]]} for r in rows]
    show_list(rows, ["rollout", "model", "version", "state", "regions", "started_at", "reason"], output)


@rollouts_app.command("get")
def get(rollout: str, watch: Watch = False, output: Output = Format.table) -> None:
    """One roll-out: its regions, gates and node phases, the reason first."""
    client = Client.find()
    if watch:
        _follow(client, rollout)
        return
    view = client.get(f"/v1/rollouts/{rollout}")
    if output is Format.table:
        from rich.console import Console

        from fedtide.console.cli.watching import draw_rollout

        Console(soft_wrap=True).print(draw_rollout(view))
    else:
        show_one(view, output)


@rollouts_app.command("watch")
def watch_rollout(rollout: str) -> None:
    """Follow a roll-out to its end; exit code 1 if it does not complete."""
    _follow(Client.find(), rollout)


@rollouts_app.command("wait")
def wait(
    rollout: str,
    state: Annotated[str, typer.Option("--for", help="completed, paused, rolledback, superseded, or region=R")],
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds")] = 3600.0,
) -> None:
    """Wait until a roll-out, or its wave in a region, is so far. Exit code 1: it ended otherwise; 75: timeout."""
    client = Client.find()
    kind, _, region = state.partition("=")
    if kind != "region" and state not in _STATES:
        raise ConfigError("--for", f"{state!r} is no state", f"Use one of {', '.join(_STATES)}, or region=R")
    for view in client.stream(f"/v1/rollouts/{rollout}/watch?through_pauses", timeout_s=timeout):
        regions = {r["region"]: r["state"] for r in view["regions"]}
        if kind == "region" and region not in regions:
            raise ConfigError("--for", f"{region!r} is not in this roll-out", f"It has {', '.join(regions)}")
        if view["state"] == state or (kind == "region" and regions[region] == "over"):
            typer.echo(f"{rollout} {view['state']}: {view['reason']}")
            return
        if view["state"] in _STATES and view["state"] != "paused":
            typer.echo(f"{rollout} {view['state']}: {view['reason']}")
            raise typer.Exit(1)
    raise TransientError(f"{rollout} is not {state} after {timeout:g} s", f"See `fedtide rollout get {rollout}`")


_STATES = ("completed", "paused", "rolledback", "superseded")

Reason = Annotated[str, typer.Option("--reason", help="Why; shown to whoever looks")]
ASKED = "asked by a person"


@rollouts_app.command("pause")
def pause(rollout: str, reason: Reason = ASKED, output: Output = Format.table) -> None:
    """Offer nothing more, and decide nothing; errors still take the release back."""
    _wish(rollout, "pause", output, reason)


@rollouts_app.command("resume")
def resume(rollout: str, output: Output = Format.table) -> None:
    """Go on where it stopped; what paused it is judged again."""
    _wish(rollout, "resume", output)


@rollouts_app.command("promote")
def promote(
    rollout: str,
    region: Annotated[str, typer.Option("--region", help="Default: all that wait")] = "",
    output: Output = Format.table,
) -> None:
    """Take the decision that a wave waits for: approval, bake, gates."""
    _wish(rollout, "promote", output, region=region)


@rollouts_app.command("abort")
def abort(rollout: str, reason: Reason = ASKED, output: Output = Format.table) -> None:
    """Stop a roll-out and take the release back from every node that was offered it."""
    _wish(rollout, "abort", output, reason)


@rollouts_app.command("rollback")
def rollback(rollout: str, reason: Reason = ASKED, output: Output = Format.table) -> None:
    """Take the release back from every node, also when the roll-out is completed."""
    _wish(rollout, "rollback", output, reason)


@rollouts_app.command("next")
def next_group(rollout: str, output: Output = Format.table) -> None:
    """Begin the next regions now, beside those that are under way."""
    _wish(rollout, "next", output)


@rollouts_app.command("retry")
def retry(rollout: str, output: Output = Format.table) -> None:
    """Offer the release again to nodes that failed or never took it."""
    _wish(rollout, "retry", output)


def _wish(rollout: str, wish: str, output: Format, reason: str = ASKED, region: str = "") -> None:
    view = Client.find().post(f"/v1/rollouts/{rollout}/{wish}", {"reason": reason, "region": region})
    if output is Format.table:
        typer.echo(f"{rollout} {view['state']}" + (f": {view['reason']}" if view["reason"] else ""))
    else:
        show_one(view, output)


def _follow(client: Client, rollout: str) -> None:
    from fedtide.console.cli.watching import draw_rollout, follow, rollout_lines

    last = follow(client.stream(f"/v1/rollouts/{rollout}/watch"), draw_rollout, rollout_lines)
    if last.get("state") != "completed":
        raise typer.Exit(1)
