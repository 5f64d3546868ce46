"""The verbs that every noun has, under the same names: `show` (also `get`), `ls`, `watch`, `wait`, `rm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

Command = Callable[..., Any]


def shows(noun: typer.Typer) -> Callable[[Command], Command]:
    """`show`, and `get` for those who type that."""

    def add(command: Command) -> Command:
        noun.command("show")(command)
        noun.command("get", hidden=True)(command)
        return command

    return add


def removes(noun: typer.Typer, also: str) -> Callable[[Command], Command]:
    """`rm`, and `also`: the noun's own verb for it."""

    def add(command: Command) -> Command:
        noun.command("rm")(command)
        noun.command(also, hidden=also == "remove")(command)
        return command

    return add
