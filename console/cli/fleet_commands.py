"""`fedtide fleet ...`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console.cli.output import Format, Output, megabytes, show_list, show_one
from fedtide.console.client import Client
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.nats.credentials import write_secret

fleet_app = typer.Typer(no_args_is_help=True, help="The nodes of the fleet, and who may join it.")
token_app = typer.Typer(no_args_is_help=True, help="Join tokens: with one, new nodes get credentials of their own.")
fleet_app.add_typer(token_app, name="token")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@fleet_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All nodes, with what they serve and do."""
    rows = Client.find().get("/v1/nodes")
    if output is Format.table:
        rows = [
            {**r, "memory": megabytes(r["rss_bytes"]), "serving": {m: d[:12] for m, d in r["serving"].items()}}
            for r in rows
        ]
    show_list(rows, ["name", "region", "state", "cpus", "extras", "memory", "serving", "busy", "reason"], output)


@fleet_app.command("show")
def show(node: str, output: Output = Format.table) -> None:
    """One node."""
    show_one(Client.find().get(f"/v1/nodes/{node}"), output)


@fleet_app.command("revoke")
def revoke(node: str, reason: Annotated[str, typer.Option(help="For the log")] = "") -> None:
    """Take a node's credentials away. Its connections end at once; a new join token lets it in again."""
    Client.find().post(f"/v1/nodes/{node}/revoke", {"reason": reason})
    typer.echo(f"revoked {node}")


@fleet_app.command("region")
def region(
    name: str,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the files to")] = None,
    secret: Annotated[str, typer.Option(help="Print a Kubernetes Secret of this name instead")] = "",
    host: Annotated[list[str] | None, typer.Option(help="Name under which nodes reach the leaf; repeat")] = None,
) -> None:
    """New credentials for a region's servers. Those it had before are withdrawn: install these soon."""
    if (out is None) == (not secret):
        raise ConfigError("--out", "give either --out FOLDER or --secret NAME")
    made = Client.find().post(f"/v1/regions/{name}/credentials", {"hosts": host or []})
    if out is not None:
        for file, text in made["files"].items():
            write_secret(out / file, text)
    else:
        typer.echo(_manifest(secret, made["files"]), nl=False)
    for account, key in made["accounts"].items():
        typer.echo(f"hub.accounts.{account}: {key}", err=True)


def _manifest(name: str, files: dict[str, str]) -> str:
    import yaml

    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "stringData": files}
    return str(yaml.safe_dump(body, sort_keys=False))


@token_app.command("create")
def create(
    region: Annotated[str, typer.Option(help="Only nodes of this region; default: any")] = "",
    uses: Annotated[int, typer.Option(min=1, help="How many nodes may enrol with it")] = 1,
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 1h, 7d")] = "1h",
    replace: Annotated[bool, typer.Option(help="Also nodes that have credentials already")] = False,
) -> None:
    """A join token, on standard output. It is shown once."""
    asked = {"region": region, "uses": uses, "ttl_s": seconds(ttl), "replaces": replace}
    typer.echo(Client.find().post("/v1/join-tokens", asked)["token"])


@token_app.command("ls")
def tokens(output: Output = Format.table) -> None:
    """The join tokens, without their secrets."""
    columns = ["token", "region", "state", "uses_left", "expires", "replaces", "by"]
    show_list(Client.find().get("/v1/join-tokens"), columns, output)


@token_app.command("revoke")
def revoke_token(token: Annotated[str, typer.Argument(help="Its name, as `token ls` shows it")]) -> None:
    """Nobody enrols with it any more; nodes that did keep their credentials."""
    Client.find().call("DELETE", f"/v1/join-tokens/{token}")
    typer.echo(f"revoked {token}")


def seconds(text: str) -> float:
    """A duration such as 90s, 30m, 1h or 7d, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise ConfigError("--ttl", f"{text!r} is no duration", "For example 90s, 30m, 1h, 7d")
    return float(found[1]) * _SECONDS[found[2]]
