"""`fedtide app ...`: apps as the coordinator keeps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtide.console.app_bundles import Train, TrainWith, WithWheels, pushed, training_bundle
from fedtide.console.cli import grammar
from fedtide.console.client import Client
from fedtide.console.output import say
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.tensors.blobs import BlobRef

apps_app = typer.Typer(no_args_is_help=True, help="Flower apps.")


App = Annotated[Path, typer.Argument(help="Folder of the app")]


@apps_app.command("export-training")
def export_training(
    app: App,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Run config override key=value; repeat")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; else only checked and cached")] = None,
) -> None:
    """Make and prove the app's training bundle, which nodes without torch train from. Needs torch."""
    from fedtide.fabric.tensors import training_bundle as bundles

    made = training_bundle(app, grammar.settings(settings or [], describe(app).config))
    data = made.read_bytes()
    manifest = bundles.read(data).manifest
    if output is not None:
        output.write_bytes(data)
    count = sum(math.prod(p.shape) for p in manifest.parameters)
    typer.echo(
        f"{count} parameters, {len(data)} bytes, within {manifest.torch_difference:.0e} of torch: {output or made}"
    )


@apps_app.command("check")
def check(
    app: App,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=16, help="Virtual nodes")] = 2,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Run config override key=value; repeat")] = None,
    train: Train = TrainWith.flower,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds until it is given up")] = 600.0,
    with_wheels: WithWheels = False,
    app_index: Annotated[str, typer.Option(help="Index for packages that it needs, as for `fedtide up`")] = "",
    folder: Annotated[Path | None, typer.Option(help="Keep the trial's files there; else nothing is left")] = None,
) -> None:
    """Try an app on this machine: one round with a few nodes, its output, and tracebacks. Exit code 1: it fails."""
    from fedtide.console.app_check import Trial
    from fedtide.console.app_check import check as run_check

    chosen = grammar.settings(settings or [], describe(app).config)
    trial = Trial(app, nodes, rounds, chosen, train, timeout, app_index, with_wheels)
    problems = run_check(trial, folder)
    for problem in problems:
        say(f"\nPROBLEM {problem}")
    if problems:
        raise typer.Exit(1)
    say(f"{describe(app).name} runs here: `fedtide run start --app {app}` gives it to the fleet")


@apps_app.command("push")
def push(app: App, train: Train = TrainWith.flower, with_wheels: WithWheels = False) -> None:
    """Give an app to the coordinator; prints `spec.app` of a FederatedRun."""
    import yaml

    ref = pushed(Client.find(), app, {}, train, with_wheels=with_wheels)
    named: dict[str, Any] = {"name": ref.name, "bundle": _camel(ref.bundle)}
    if ref.requirements:
        named["requirements"] = ref.requirements
    if ref.wheels:
        named["wheels"] = {name: _camel(blob) for name, blob in ref.wheels.items()}
    if ref.signatures:
        named["signatures"] = ref.signatures
    typer.echo(yaml.safe_dump({"app": named}, sort_keys=False), nl=False)


def _camel(ref: BlobRef) -> dict[str, Any]:
    return {"digest": ref.digest, "sizeBytes": ref.size_bytes}
