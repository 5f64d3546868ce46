"""`fedtide tenant ...`: who shares an installation, and how much of it each may use."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedtide.console import endpoints
from fedtide.console.cli.grammar import size
from fedtide.console.cli.verbs import removes, shows
from fedtide.console.client import ApiError, Client
from fedtide.console.home import TENANT, Home
from fedtide.console.output import Format, Limit, Output, say, show_list, show_one
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.tenants import (
    Files,
    NewTenant,
    Quota,
    QuotaChange,
    TenantChange,
    TenantRequest,
    TenantView,
)
from fedtide.fabric.nats.authority import SIGNER
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.trust.installation import DIRECTOR_KEY, RELEASES_KEY, ROOTS, TARGETS, TIMESTAMP_KEY
from fedtide.fabric.trust.installation import begin as begin_trust
from fedtide.fabric.trust.keys import public_pem
from fedtide.fabric.validation import checked

tenant_app = typer.Typer(no_args_is_help=True, help="Tenants: who shares this installation, apart from each other.")


@tenant_app.callback()
def _of_the_installation() -> None:
    """Tenants: who shares this installation, apart from each other."""
    if os.environ.get(TENANT):
        raise ConfigError(
            TENANT, "is set, and tenants have no tenants", "Unset it: this is for the installation's admins"
        )


Regions = Annotated[list[str] | None, typer.Option("--region", help="A region of the tenant; repeat")]
Nodes = Annotated[int | None, typer.Option(min=0, help="Nodes that may have credentials")]
Runs = Annotated[int | None, typer.Option(min=0, help="Runs at the same time")]
Bytes = Annotated[str | None, typer.Option(help="What the hub stores for it, such as 500MB or 20GB")]
Money = Annotated[str | None, typer.Option(help="What it may cost in a month, by the installation's prices")]


@tenant_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="1 to 20 lower case letters, digits and '-'")],
    region: Regions = None,
    nodes: Nodes = None,
    runs: Runs = None,
    bytes: Bytes = None,
    money: Money = None,
    trust: Annotated[
        Path | None,
        typer.Option(help="Folder that `fedtide trust init` made; default: new keys, for its owner to move"),
    ] = None,
    namespace: Annotated[str, typer.Option(help="Kubernetes: where its Jobs run; default: beside others")] = "",
    releases_signed_by: Annotated[
        Literal["authority", "people"], typer.Option(help="Its release authority, or people with `model sign`")
    ] = "authority",
) -> None:
    """Add a tenant. Its first token and its keys are written into a folder: give that to its owner."""
    home = Home(Home.find().root, name)
    quota = {"nodes": nodes, "runs": runs, "money": money, **({"bytes": size("--bytes", bytes)} if bytes else {})}
    asked = {
        "name": name,
        "regions": region or [],
        "quota": checked(Quota, quota).model_dump(),
        "namespace": namespace,
        "releases_signed_by": releases_signed_by,
    }
    checked(TenantRequest, {**asked, "files": {}})  # before keys are made
    there = _keys(home, trust)
    try:
        files = {each: (there / each).read_text() for each in (ROOTS, TARGETS, DIRECTOR_KEY, TIMESTAMP_KEY)}
    except OSError as exc:
        raise ConfigError("--trust", f"{exc.filename} cannot be read: {exc.strerror}", "fedtide trust init") from exc
    try:
        made = Client.find().send(endpoints.add_tenant(checked(TenantRequest, {**asked, "files": files})))
    except ApiError:
        if trust is None:  # refused, so nobody needs them; after a lost answer they may be all that there is
            shutil.rmtree(there)
            home.keys.rmdir()
        raise
    _write(home, there, made)
    say(f"{home.keys}: its token, and the keys of its root, publisher and release authority")
    say(f"its commands: {TENANT}={name} fedtide ...")
    if releases_signed_by == "authority":
        say(f"its release authority: python -m fedtide.coordinator.release_authority {_authority_file(home)}")


@tenant_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """All tenants, and what they use of their quotas."""
    views = list(Client.find().every(endpoints.tenants(), limit))
    show_list(views, [_row(view) for view in views], output)


@shows(tenant_app)
def show(name: str, output: Output = Format.table) -> None:
    """One tenant."""
    view = Client.find().send(endpoints.tenant(name))
    show_one(view, output, _row(view))


@tenant_app.command("quota")
def quota(
    name: str,
    nodes: Nodes = None,
    runs: Runs = None,
    bytes: Bytes = None,
    money: Money = None,
    unlimited: Annotated[list[str] | None, typer.Option(help="nodes, runs or money: without a limit; repeat")] = None,
    output: Output = Format.table,
) -> None:
    """Show what a tenant may use, or change it. What it has already stays, also if it is more than that."""
    given: dict[str, Any] = {"nodes": nodes, "runs": runs, "money": money, "unlimited": unlimited or []}
    given["bytes"] = size("--bytes", bytes) if bytes else None
    asked, client = checked(QuotaChange, given), Client.find()
    changes = asked != QuotaChange()
    view = client.send(endpoints.set_quota(name, asked) if changes else endpoints.tenant(name))
    show_one(view, output, _row(view))


@tenant_app.command("regions")
def regions(name: str, region: Regions = None, output: Output = Format.table) -> None:
    """Give a tenant other regions: all that it is to have."""
    view = Client.find().send(endpoints.change_tenant(name, checked(TenantChange, {"regions": region or []})))
    show_one(view, output, _row(view))


@tenant_app.command("keys")
def keys(
    name: str,
    files: Annotated[list[Path], typer.Argument(help="Files such as director-2.pem: what `trust rotate` made")],
) -> None:
    """Give the coordinator further keys of a tenant's director, before its metadata name them."""
    try:
        found: Files = {file.name: file.read_text() for file in files}
    except OSError as exc:
        raise ConfigError("files", f"{exc.filename} cannot be read: {exc.strerror}") from exc
    Client.find().send(endpoints.change_tenant(name, checked(TenantChange, {"files": found})))
    say(f"{name}: {', '.join(sorted(found))}")


@removes(tenant_app, also="remove")
def remove(
    name: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Remove a tenant: nobody of it is let in any more, and what the hub stores for it is deleted."""
    if not yes:
        typer.confirm(f"Delete {name}, with its models and its log?", abort=True)
    Client.find().send(endpoints.remove_tenant(name))
    say(f"{name} is being removed; its keys are still in {Home(Home.find().root, name).keys}")


def _row(view: TenantView) -> dict[str, Any]:
    used, quota = view.used, view.quota
    return {
        "tenant": view.name,
        "state": view.state,
        "regions": view.regions,
        "nodes": _of(used.nodes, quota.nodes),
        "runs": _of(used.runs, quota.runs),
        "bytes": _of(used.bytes, quota.bytes),
        f"{view.currency} this month": _of(f"{used.money:.2f}", quota.money),
    }


def _of(used: object, limit: object) -> str:
    return f"{used} of {limit}" if limit is not None else str(used)


def _keys(home: Home, trust: Path | None) -> Path:
    """The folder with everything that `trust init` makes; a new one if none is named.

    Raises:
        ConfigError: there are keys of a tenant of this name already.
    """
    if trust is not None:
        return trust
    if home.trust.exists():
        raise ConfigError(str(home.trust), "holds keys already", f"Go on with them (--trust {home.trust}), or move it")
    begun = begin_trust(datetime.now(UTC))
    for file, text in {**begun.coordinator, **begun.authority, **begun.offline}.items():
        write_secret(home.trust / file, text)
    return home.trust


def _write(home: Home, trust: Path, made: NewTenant) -> None:
    write_secret(home.api_token_file, made.token)
    folder = home.release_authority
    write_secret(folder / SIGNER, made.signer)
    for file in (RELEASES_KEY, ROOTS):
        if (trust / file).exists():
            write_secret(folder / file, (trust / file).read_text())
    if trust == home.trust:  # what is online is with those who use it now
        for file in (DIRECTOR_KEY, TIMESTAMP_KEY, RELEASES_KEY):
            # The name stays taken: the next key has another one.
            write_secret(trust / file, public_pem(trust / file))
    config = {
        "nats_url": made.hub_url,
        "tenant": made.name,
        "credentials": f"{folder.name}/{SIGNER}",  # beside this file: the folder is for its owner to move
        "key": f"{folder.name}/{RELEASES_KEY}",
        "roots": f"{folder.name}/{ROOTS}",
        "folder": folder.name,
    }
    write_secret(_authority_file(home), json.dumps(config, indent=2))


def _authority_file(home: Home) -> Path:
    return home.keys / "release-authority.json"
