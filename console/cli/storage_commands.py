"""`fedtide storage` and `fedtide gc`: how full hub and regions are, and what nobody needs."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.cli.grammar import seconds
from fedtide.console.client import Client
from fedtide.console.output import Format, Output, megabytes, say, show_list


def storage(output: Output = Format.table) -> None:
    """How full each stream of the hub and of the regions is, fullest first."""
    view = Client.find().send(endpoints.storage())
    streams = sorted(view.streams, key=lambda s: -s.size_bytes / s.max_bytes if s.max_bytes else 0)
    rows = [
        {
            "region": s.region,
            "stream": s.stream,
            "messages": s.messages,
            "size": megabytes(s.size_bytes),
            "of": megabytes(s.max_bytes) if s.max_bytes else "",
            "full": f"{s.size_bytes / s.max_bytes:.0%}" if s.max_bytes else "",
            "most of it": ", ".join(f"{node}: {count}" for node, count in s.largest.items()),
        }
        for s in streams
    ]
    show_list(streams, rows, output)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go")] = False,
    unused_for: Annotated[
        str, typer.Option(help="Keep apps that were uploaded since, and may be about to run")
    ] = "24h",
    output: Output = Format.table,
) -> None:
    """Delete what no run, release, rule or node needs, at the hub and in every region. It also goes by itself."""
    found = Client.find().send(endpoints.sweep(dry_run=dry_run, unused_for_s=seconds("--unused-for", unused_for))).items
    rows = [g.model_dump(include={"region", "stream", "messages", "reason", "what"}) for g in found]
    if not rows and output is Format.table:
        say("nothing to delete")
    else:
        show_list(found, rows, output)
