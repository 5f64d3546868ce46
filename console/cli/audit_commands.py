"""`fedtide audit ...`: who did what, and whether the trail is whole."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, say, show_list
from fedtide.fabric.audit_chain import broken
from fedtide.fabric.errors import ConfigError, DigestMismatch
from fedtide.fabric.messages.people import AuditEntry

audit_app = typer.Typer(no_args_is_help=True, help="The audit trail: who did what, from where, on whose behalf.")

Who = Annotated[str, typer.Option(help="Part of a name")]
Action = Annotated[str, typer.Option(help="Part of method and path, e.g. 'POST /v1/runs'")]
Since = Annotated[
    datetime | None, typer.Option(help="UTC, e.g. 2026-01-31T12:00:00", formats=["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"])
]
VERSION = "1"


class ExportFormat(StrEnum):
    jsonl = "jsonl"
    cef = "cef"


@audit_app.command("query")
def query(
    who: Who = "",
    action: Action = "",
    since: Since = None,
    until: Since = None,
    limit: Limit = 1000,
    output: Output = Format.table,
) -> None:
    """Entries, oldest first."""
    found = list(Client.find().every(endpoints.audit(who, action, since, until), limit))
    rows = [
        {
            "at": e.at,
            "who": e.who,
            "role": e.role,
            "from": e.origin,
            "behalf": e.behalf,
            "action": e.action,
            "outcome": e.outcome if not e.reason else f"{e.outcome}: {e.reason[:60]}",
        }
        for e in found
    ]
    show_list(found, rows, output)


@audit_app.command("verify")
def verify(
    file: Annotated[Path | None, typer.Option(help="An export (jsonl), instead of asking the coordinator")] = None,
    head: Annotated[str, typer.Option(help="NUMBER:HASH, as this command printed it before")] = "",
) -> None:
    """Whether every entry has its hash and follows the one before. Keep what it prints: it is checked next time."""
    entries = list(_of_file(file) if file is not None else Client.find().every(endpoints.audit()))
    if (reason := broken(entries)) is not None:
        raise DigestMismatch(f"the audit trail is not whole: {reason}")
    number, _, known = head.partition(":")
    if head and not (number.isdecimal() and len(known) == 64):
        raise ConfigError("--head", f"{head!r} is not NUMBER:HASH", "As `audit verify` prints it")
    if head and entries and int(number) < entries[0].number:
        raise ConfigError("--head", f"entry {number} is no longer kept", "Verify the export that has it (--file)")
    if head:
        there = next((e for e in entries if str(e.number) == number), None)
        if there is None or there.hash != known:
            raise DigestMismatch(f"the audit trail is another one: entry {number} is not the one of before")
    if not entries:
        say("the audit trail is empty")
        return
    first, last = entries[0], entries[-1]
    say(f"whole: entries {first.number} to {last.number}")
    say(f"head: {last.number}:{last.hash}")


def _of_file(file: Path) -> Iterator[AuditEntry]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        yield from (AuditEntry.model_validate_json(line) for line in lines if line.strip())
    except (OSError, ValueError) as exc:
        raise ConfigError(str(file), f"is no export: {exc}", "fedtide audit export") from exc


@audit_app.command("export")
def export(
    form: Annotated[ExportFormat, typer.Option("--format", help="jsonl: whole; cef: for a SIEM")] = ExportFormat.jsonl,
    since: Since = None,
    until: Since = None,
    file: Annotated[Path | None, typer.Option(help="Default: standard output")] = None,
) -> None:
    """All entries, a line each."""
    entries = Client.find().every(endpoints.audit(since=since, until=until))
    lines = (cef(entry) if form is ExportFormat.cef else entry.model_dump_json() for entry in entries)
    if file is None:
        for line in lines:
            say(line)
        return
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for count, line in enumerate(lines, 1):  # noqa: B007  # how many there were is said
            out.write(f"{line}\n")
    say(f"{file}: {count} entries")


def cef(entry: AuditEntry) -> str:
    """As ArcSight's Common Event Format (CEF, version 26)."""
    failed = entry.outcome == "failed" or (entry.outcome.isdecimal() and int(entry.outcome) >= 400)
    head = "|".join(
        _head(part)
        for part in (
            "CEF:0",
            "fedtide",
            "fedtide",
            VERSION,
            entry.action.split(" ")[0],
            entry.action,
            "7" if failed else "3",
        )
    )
    fields = {
        "rt": str(int(entry.at.timestamp() * 1000)),
        "suser": entry.who,
        "spriv": entry.role,
        "src": entry.origin,
        "outcome": entry.outcome,
        "reason": entry.reason,
        "externalId": str(entry.number),
        "cs1Label": "behalf",
        "cs1": entry.behalf,
        "cs2Label": "asked",
        "cs2": entry.asked,
        "cs3Label": "hash",
        "cs3": entry.hash,
    }
    return f"{head}|{' '.join(f'{name}={_field(text)}' for name, text in fields.items() if text)}"


def _head(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("\r", " ")


def _field(text: str) -> str:
    return text.replace("\\", "\\\\").replace("=", "\\=").replace("\r", "\\r").replace("\n", "\\n")
