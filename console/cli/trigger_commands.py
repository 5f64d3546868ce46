"""`fedtide trigger ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtide.console.cli.app_bundles import Train, TrainWith, packed
from fedtide.console.cli.output import Format, Output, show_list, show_one
from fedtide.console.cli.run_commands import parse_settings
from fedtide.console.client import Client
from fedtide.fabric.ids import new_id

triggers_app = typer.Typer(no_args_is_help=True, help="Rules that start something because something happened.")

Type = Annotated[str, typer.Option("--type", help="Event type, e.g. com.example.drift")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="A field of the event, key=value; repeat")]
EventId = Annotated[str | None, typer.Option("--id", help="Event id; the same id counts once")]


@triggers_app.command("apply")
def apply(
    file: Annotated[Path, typer.Argument(help="YAML with one rule a document")], train: Train = TrainWith.flower
) -> None:
    """Create or change rules. All are checked before the first is applied."""
    from fedtide.console.cli.rule_files import read, validate

    client = Client.find()
    rules = []
    for document, node in read(file):
        action = document.get("do")
        if isinstance(action, dict) and isinstance(action.get("app"), str):
            document = {**document, "do": {**action, **_bundled(client, file.parent / action["app"], action, train)}}
        rules.append(validate(file, document, node))
    for rule in rules:
        client.call("PUT", f"/v1/triggers/{rule.name}", rule.model_dump_json().encode())
        typer.echo(f"{rule.name} applied: on {rule.type} {rule.do.kind}")


def _bundled(client: Client, directory: Path, action: dict[str, Any], train: TrainWith) -> dict[str, Any]:
    from fedtide.fabric.flower.apps import describe

    described = describe(directory)
    config = action.get("run_config")
    files = packed(directory, config if isinstance(config, dict) else {}, train)
    reference = json.loads(client.call("PUT", "/v1/bundles", files))
    return {"app": {"name": described.name, "bundle": reference}, "model": action.get("model") or described.model}


@triggers_app.command("ls")
def ls(output: Output = Format.table) -> None:
    """All rules."""
    rows = Client.find().get("/v1/triggers")
    show_list(rows, ["trigger", "on", "where", "does", "policy", "fired", "budget", "active", "queued"], output)


@triggers_app.command("history")
def history(name: str, output: Output = Format.table) -> None:
    """What a rule made of the events it saw, newest last."""
    lines = Client.find().get(f"/v1/triggers/{name}")["history"]
    show_list(lines, ["at", "type", "signal", "outcome", "reason", "started"], output)


@triggers_app.command("test")
def judge(name: str, type_: Type, settings: Sets = None, event: EventId = None, output: Output = Format.table) -> None:
    """Say what an event would do, without doing it."""
    body = _event(type_, settings, event)
    show_one(_post(f"/v1/triggers/{name}/test", body), output)


@triggers_app.command("fire")
def fire(type_: Type, settings: Sets = None, event: EventId = None, output: Output = Format.table) -> None:
    """Send an event, as a webhook would."""
    show_one(_post("/v1/events", _event(type_, settings, event)), output)


@triggers_app.command("rm")
def remove(name: str) -> None:
    """Remove a rule. What it started goes on."""
    Client.find().call("DELETE", f"/v1/triggers/{name}")
    typer.echo(f"{name} removed")


def _event(type_: str, settings: list[str] | None, event: str | None) -> bytes:
    attributes = {"specversion": "1.0", "id": event or new_id("cli"), "source": "fedtide-cli", "type": type_}
    return json.dumps({**attributes, "data": parse_settings(settings or [], {})}).encode()


def _post(path: str, body: bytes) -> dict[str, Any]:
    headers = {"Content-Type": "application/cloudevents+json"}
    answer: dict[str, Any] = json.loads(Client.find().call("POST", path, body, headers))
    return answer
