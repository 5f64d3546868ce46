"""`fedtide why ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.output import Format, Output, say, show_one
from fedtide.fabric.errors import ConfigError


def why(
    name: Annotated[str, typer.Argument(help="A run, RUN/NUMBER for one of its rounds, a roll-out, node, model, rule")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest so many events")] = 40,
    output: Output = Format.table,
) -> None:
    """Why something is as it is: the present state, then the events that led to it."""
    about, slash, number = name.partition("/")
    if slash and not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise ConfigError(
            name, "is no name, and no RUN/NUMBER: what follows the slash is not a number", "Example: run-1/3"
        )
    view = Client.find().send(endpoints.why(about, limit, int(number) if slash else None))
    if output is not Format.table:
        show_one(view, output)
        return
    first, *rest = view.present
    say(f"{name}: {first}")
    for line in rest:
        say(f"  {line}")
    for step in view.because:
        say(f"{step.at:%Y-%m-%dT%H:%M:%S}.{step.at.microsecond // 1000:03d}Z  {step.what}  ({step.event})")
