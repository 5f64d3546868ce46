"""The one place that prints: tables for people, JSON and YAML for programs. Data is never markup.

No colour when piped, lines instead of a redrawn screen where there is no terminal that can redraw.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

if TYPE_CHECKING:
    from rich.console import Console


class Format(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


Output = Annotated[Format, typer.Option("-o", "--output", help="table, json or yaml")]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter("is no number of seconds")
    return value


Timeout = Annotated[float, typer.Option("--timeout", min=0.1, callback=_finite, help="Seconds")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1_000_000, help="Show at most so many")]


def show_list(views: Iterable[BaseModel], rows: Sequence[Mapping[str, Any]], output: Format) -> None:
    """A listing: `rows` as a table (its columns are those of the first row), or the views whole as JSON or YAML."""
    if output is not Format.table:
        dump([view.model_dump(mode="json") for view in views], output)
    else:
        show_rows(rows, output)


def show_rows(rows: Sequence[Mapping[str, Any]], output: Format) -> None:
    """Rows of plain values, all with the same columns."""
    if output is not Format.table:
        dump(list(rows), output)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not rows:
        say("none")
        return
    table = Table(*[c.replace("_", " ") for c in rows[0]], box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*[Text(cell(value)) for value in row.values()])
    console().print(table)


def show_one(view: BaseModel, output: Format, row: Mapping[str, Any] | None = None) -> None:
    """One thing: its fields (or `row`) as a table, or whole as JSON or YAML."""
    if output is not Format.table:
        dump(view.model_dump(mode="json"), output)
    else:
        show_fields(row if row is not None else view.model_dump(), output)


def show_fields(fields: Mapping[str, Any], output: Format) -> None:
    """One thing of plain values."""
    if output is not Format.table:
        dump(dict(fields), output)
        return
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table("field", "value", box=SIMPLE, show_header=False)
    for key, entry in fields.items():
        table.add_row(Text(key.replace("_", " ")), Text(cell(entry)))
    console().print(table)


def say(line: str) -> None:
    """One line of text."""
    typer.echo(line)


def cell(value: Any) -> str:
    """One table cell."""
    match value:
        case None:
            return "-"
        case datetime():
            return value.isoformat(timespec="seconds").replace("+00:00", "Z")
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


def dump(value: Any, output: Format) -> None:
    """JSON or YAML."""
    if output is Format.json:
        typer.echo(json.dumps(value, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)


def console() -> Console:
    """Where tables and trees go. A pipe has no width: wide enough that nothing a script looks for is cut."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 240
    return Console(width=width, markup=False, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def can_redraw() -> bool:
    """Whether standard output is a terminal on which a view can be drawn again."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"
