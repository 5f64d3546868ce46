"""`fedtide fleet ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedtide.console import endpoints
from fedtide.console.cli.grammar import seconds
from fedtide.console.cli.model_commands import show_influence
from fedtide.console.cli.verbs import removes, shows
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, megabytes, say, show_list, show_one
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.requests import TokenRequest
from fedtide.fabric.messages.views import NodeState, NodeView
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.validation import checked

fleet_app = typer.Typer(no_args_is_help=True, help="The nodes of the fleet, and who may join it.")
token_app = typer.Typer(no_args_is_help=True, help="Join tokens: with one, new nodes get credentials of their own.")
fleet_app.add_typer(token_app, name="token")


@fleet_app.command("ls")
def ls(
    state: Annotated[NodeState | None, typer.Option("--state", help="Only nodes in this state")] = None,
    region: Annotated[str, typer.Option("--region", help="Only nodes of this region")] = "",
    nodes: Annotated[str, typer.Option("--nodes", help="Labels, e.g. zone=a,hardware=arm64")] = "",
    limit: Limit = 1000,
    output: Output = Format.table,
) -> None:
    """All nodes, with what they serve and do."""
    listing = endpoints.nodes(state=state, region=region, labels=nodes)
    views = list(Client.find().every(listing, limit))
    show_list(views, [_row(view) for view in views], output)


def _row(view: NodeView) -> dict[str, Any]:
    return {
        **view.model_dump(include={"name", "region", "state", "cpus", "extras"}),
        "memory": megabytes(view.rss_bytes),
        "serving": {model: digest[:12] for model, digest in view.serving.items()},
        "busy": view.busy,
        "reason": "; ".join([text for text in (view.reason, *view.warnings) if text]),
    }


@shows(fleet_app)
def show(node: str, output: Output = Format.table) -> None:
    """One node."""
    show_one(Client.find().send(endpoints.node(node)), output)


@fleet_app.command("revoke")
def revoke(node: str, reason: Annotated[str, typer.Option(help="For the log")] = "") -> None:
    """Take a node's credentials away. Its connections end at once; a new join token lets it in again."""
    Client.find().send(endpoints.revoke_node(node, reason))
    say(f"revoked {node}")


@fleet_app.command("quarantine")
def quarantine(
    node: str,
    reason: Annotated[str, typer.Option(help="For the log")] = "",
    lift: Annotated[bool, typer.Option("--lift", help="Take it back: the node may train again")] = False,
    output: Output = Format.table,
) -> None:
    """Ask a node to train no more, and show what its updates have influenced and how to go on without them."""
    view = Client.find().send(endpoints.quarantine(node, reason, lift=lift))
    if output is Format.table:
        say(f"{node} {'may train again' if lift else 'is quarantined: it is not asked to train'}")
    show_influence(view, output)


@removes(fleet_app, also="remove")
def remove(node: str) -> None:
    """Forget a node that is gone for good. Its credentials are void; a join token lets one of that name in again."""
    Client.find().send(endpoints.remove_node(node))
    say(f"removed {node}")


@fleet_app.command("region")
def region(
    name: str,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the files to")] = None,
    secret: Annotated[str, typer.Option(help="Print a Kubernetes Secret of this name instead")] = "",
    host: Annotated[list[str] | None, typer.Option(help="Name under which nodes reach the leaf; repeat")] = None,
    values: Annotated[Path | None, typer.Option(help="Write what the edge chart needs to know into this file")] = None,
    rotate: Annotated[
        bool, typer.Option(help="Withdraw those before: the region is cut off until it has these")
    ] = False,
) -> None:
    """New credentials for a region's servers. Those before stay good until the next time, or for a year."""
    if (out is None) == (not secret):
        raise ConfigError("--out", "give either --out FOLDER or --secret NAME")
    made = Client.find().send(endpoints.region_credentials(name, host or [], rotates=rotate))
    if out is not None:
        for file, text in made.files.items():
            write_secret(out / Path(file).name, text)
    else:
        typer.echo(_manifest(secret, made.files), nl=False)
    if values is not None:
        import yaml

        values.write_text(yaml.safe_dump({"region": name, "hub": {"accounts": made.accounts}}))
        return
    for account, key in made.accounts.items():
        typer.echo(f"hub.accounts.{account}: {key}", err=True)


def _manifest(name: str, files: dict[str, str]) -> str:
    import yaml

    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "stringData": files}
    return str(yaml.safe_dump(body, sort_keys=False))


@token_app.command("create")
def create(
    region: Annotated[str, typer.Option(help="Only nodes of this region; default: any")] = "",
    uses: Annotated[int, typer.Option(min=1, max=100_000, help="How many nodes may enrol with it")] = 1,
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 1h, 7d")] = "1h",
    replace: Annotated[bool, typer.Option(help="Also nodes that have credentials already")] = False,
) -> None:
    """A join token, on standard output. It is shown once."""
    given = {"region": region, "uses": uses, "ttl_s": seconds("--ttl", ttl), "replaces": replace}
    asked = checked(TokenRequest, given)
    say(Client.find().send(endpoints.create_join_token(asked)).token)


@token_app.command("ls")
def tokens(limit: Limit = 1000, output: Output = Format.table) -> None:
    """The join tokens, without their secrets."""
    views = list(Client.find().every(endpoints.join_tokens(), limit))
    show_list(views, [view.model_dump() for view in views], output)


@removes(token_app, also="revoke")
def revoke_token(token: Annotated[str, typer.Argument(help="Its name, as `token ls` shows it")]) -> None:
    """Revoke a join token. Nodes that enrolled with it keep their credentials."""
    Client.find().send(endpoints.revoke_join_token(token))
    say(f"revoked {token}")
