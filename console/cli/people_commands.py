"""`fedtide login`, `logout`, `whoami` and `fedtide token ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtide.console import endpoints, stored_logins
from fedtide.console.cli.grammar import seconds
from fedtide.console.cli.verbs import removes
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, say, show_list, show_one
from fedtide.console.servers import Servers
from fedtide.fabric.messages.people import Role, ServiceTokenRequest
from fedtide.fabric.validation import checked

service_tokens_app = typer.Typer(no_args_is_help=True, help="Service tokens: what a program shows to the API.")


def login(
    device: Annotated[bool, typer.Option("--device", help="Log in on another machine, with a code")] = False,
) -> None:
    """Log in where the installation's people do ($FEDTIDE_SERVER names the installation)."""
    servers = Servers.find()
    where = Client(servers).send(endpoints.login())
    flow = stored_logins.with_device if device else stored_logins.with_browser
    made = flow(where, lambda line: typer.echo(line, err=True))
    for url in servers.urls:
        stored_logins.keep(url, made)
    whoami()


def logout() -> None:
    """Forget the login of this person to the installation."""
    for url in Servers.find().urls:
        stored_logins.keep(url, None)
    say("logged out")


def whoami(output: Output = Format.table) -> None:
    """Who you are to the API, and what you may do."""
    show_one(Client.find().send(endpoints.whoami()), output)


@service_tokens_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What it is for")],
    role: Annotated[Role, typer.Option(help="What its holder may do")] = "viewer",
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 1h, 7d")] = "30d",
) -> None:
    """A service token, on standard output. It is shown once; set it as FEDTIDE_TOKEN."""
    asked = checked(ServiceTokenRequest, {"name": name, "role": role, "ttl_s": seconds("--ttl", ttl)})
    say(Client.find().send(endpoints.create_service_token(asked)).token)


@service_tokens_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """Service tokens, without their secrets."""
    views = list(Client.find().every(endpoints.service_tokens(), limit))
    show_list(views, [view.model_dump() for view in views], output)


@removes(service_tokens_app, also="revoke")
def revoke(token: Annotated[str, typer.Argument(help="Its id, as `token ls` shows it")]) -> None:
    """Withdraw a service token: at once."""
    Client.find().send(endpoints.revoke_service_token(token))
    say(f"revoked {token}")
