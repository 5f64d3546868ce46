"""`fedtide trigger ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from fedtide.console import endpoints
from fedtide.console.app_bundles import Train, TrainWith, WithWheels, pushed
from fedtide.console.cli import grammar
from fedtide.console.cli.rule_files import at, read, validate
from fedtide.console.cli.verbs import removes, shows
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, say, show_list, show_one
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.ids import new_id
from fedtide.fabric.plans.trigger_rule import TriggerRule

triggers_app = typer.Typer(no_args_is_help=True, help="Rules that start an action when an event matches.")

Type = Annotated[str, typer.Option("--type", help="Event type, e.g. com.example.drift")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="A field of the event, key=value; repeat")]
EventId = Annotated[str | None, typer.Option("--id", help="Event id; the same id counts once")]


@triggers_app.command("apply")
def apply(
    file: Annotated[Path, typer.Argument(help="YAML with one rule a document")],
    train: Train = TrainWith.flower,
    with_wheels: WithWheels = False,
) -> None:
    """Create or change rules. All are checked before the first is applied."""
    documents = read(file)
    client = Client.find()
    rules = []
    for document, node in documents:
        action = document.get("do")
        if isinstance(action, dict) and isinstance(action.get("app"), str):
            app = file.parent / action["app"]
            _check_config(file, node, app, action.get("run_config"))
            document = {**document, "do": {**action, **_bundled(client, app, action, train, with_wheels)}}
        rules.append(validate(file, document, node, TriggerRule))
    for rule in rules:
        client.send(endpoints.apply_trigger(rule))
        say(f"{rule.name} applied: on {rule.type} {rule.do.kind}")


def _check_config(file: Path, node: yaml.Node, app: Path, overrides: object) -> None:
    """Raises ConfigError, with its position, for a value of the run config that the app does not declare so."""
    from fedtide.fabric.flower.apps import describe, fuse

    declared = describe(app).config
    for key, value in (overrides if isinstance(overrides, dict) else {}).items():
        try:
            fuse(declared, {key: value})
        except ConfigError as exc:
            raise ConfigError(at(file, node, "do", "run_config", str(key)), exc.problem, exc.remedy) from exc


def _bundled(
    client: Client, directory: Path, action: dict[str, Any], train: TrainWith, with_wheels: bool
) -> dict[str, Any]:
    from fedtide.fabric.flower.apps import describe

    config = action.get("run_config")
    ref = pushed(client, directory, config if isinstance(config, dict) else {}, train, with_wheels=with_wheels)
    described = describe(directory)
    track = {"track": described.track.model_dump()} if described.track is not None and "track" not in action else {}
    return {"app": ref.model_dump(), "model": action.get("model") or described.model, **track}


@triggers_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """All rules."""
    views = list(Client.find().every(endpoints.triggers(), limit))
    columns = {"trigger", "on", "where", "does", "policy", "fired", "budget", "active", "queued"}
    show_list(views, [view.model_dump(include=columns) for view in views], output)


@shows(triggers_app)
def show(name: str, output: Output = Format.table) -> None:
    """One rule."""
    view = Client.find().send(endpoints.trigger(name))
    show_one(view, output, view.model_dump(exclude={"history", "rule"}))


@triggers_app.command("history")
def history(name: str, output: Output = Format.table) -> None:
    """The decisions of a rule on the events it saw, newest last."""
    lines = Client.find().send(endpoints.trigger(name)).history
    show_list(lines, [line.model_dump() for line in lines], output)


@triggers_app.command("test")
def judge(name: str, type_: Type, settings: Sets = None, event: EventId = None, output: Output = Format.table) -> None:
    """Say what an event would do, without doing it."""
    show_one(Client.find().send(endpoints.test_trigger(name, _event(type_, settings, event))), output)


@triggers_app.command("fire")
def fire(type_: Type, settings: Sets = None, event: EventId = None, output: Output = Format.table) -> None:
    """Send an event, as a webhook would."""
    show_one(Client.find().send(endpoints.send_event(_event(type_, settings, event))), output)


@removes(triggers_app, also="remove")
def remove(name: str) -> None:
    """Remove a rule. Runs and roll-outs that it started continue."""
    Client.find().send(endpoints.remove_trigger(name))
    say(f"{name} removed")


def _event(type_: str, settings: list[str] | None, event: str | None) -> bytes:
    attributes = {"specversion": "1.0", "id": event or new_id("cli"), "source": "fedtide-cli", "type": type_}
    return json.dumps({**attributes, "data": grammar.settings(settings or [], {})}).encode()
