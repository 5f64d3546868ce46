"""`fedtide identity ...`."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.output import Format, Output, show_list
from fedtide.fabric.messages.views import RoleRights

identity_app = typer.Typer(no_args_is_help=True, help="Who may do what: accounts, roles and their rights.")


@identity_app.command("audit")
def audit(output: Output = Format.table) -> None:
    """Every role's rights and limits, from the accounts as the servers know them now."""
    found = Client.find().send(endpoints.rights()).accounts
    rows = [
        {"account": account.account, "role": role, "may": may, "subject": subject}
        for account in found
        for role, rights in account.roles.items()
        for may, subject in _lines(rights)
    ]
    show_list(found, rows, output)


def _lines(rights: RoleRights) -> Iterator[tuple[str, str]]:
    yield from (("publish", subject) for subject in rights.publish)
    yield from (("subscribe", subject) for subject in rights.subscribe)
    if rights.answers:
        yield "answer", "what it is asked, once"
    bounds = {"subscriptions": rights.subscriptions, "bytes a message": rights.payload_bytes}
    if limits := ", ".join(f"{number} {name}" for name, number in bounds.items() if number >= 0):
        yield "have", limits
