"""How listings are shown: tables for people, JSON and YAML for programs. No colour when piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer


class Format(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


Output = Annotated[Format, typer.Option("-o", "--output", help="table, json or yaml")]


def show_list(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], output: Format) -> None:
    """Rows as a table of `columns`, or whole as JSON or YAML."""
    if output is not Format.table:
        _dump(list(rows), output)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*[c.replace("_", " ") for c in columns], box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*[cell(row.get(c)) for c in columns])
    _print(table)


def show_one(value: Mapping[str, Any], output: Format) -> None:
    """One thing: its fields as a table, or whole as JSON or YAML."""
    if output is not Format.table:
        _dump(value, output)
        return
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("field", "value", box=SIMPLE, show_header=False)
    for key, entry in value.items():
        table.add_row(key.replace("_", " "), cell(entry))
    _print(table)


def cell(value: Any) -> str:
    """One table cell."""
    match value:
        case None:
            return "-"
        case bool() | int() | str():
            return str(value)
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{k}={cell(v)}" for k, v in value.items()) or "-"
        case list():
            if any(isinstance(v, dict) for v in value):
                return "\n".join(cell(v) for v in value)
            return ", ".join(map(str, value)) or "-"
        case _:
            return str(value)


def _dump(value: Any, output: Format) -> None:
    if output is Format.json:
        typer.echo(json.dumps(value, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(value, sort_keys=False), nl=False)


def _print(renderable: Any) -> None:
    from rich.console import Console

    # A pipe has no width: wide enough that nothing a script looks for is cut.
    Console(width=None if sys.stdout.isatty() else 240).print(renderable)


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"
