"""Packs an app for the coordinator: its files, and its training bundle if nodes are to train without torch."""

from __future__ import annotations

import json
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtide.console import endpoints
from fedtide.console.app_wheels import Machine, gathered
from fedtide.console.client import Client
from fedtide.console.publishing import signed
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.flower.app_files import app_files, bundle
from fedtide.fabric.flower.apps import AppDescription, describe
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.process.python import module_command
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.training_bundle import TRAINING


class TrainWith(StrEnum):
    """What nodes may train with."""

    flower = "flower"
    onnx = "onnx"


WithWheels = Annotated[
    bool, typer.Option("--with-wheels", help="Send the wheels of what the app needs along: nodes need no index then")
]
Train = Annotated[TrainWith, typer.Option("--train", help="onnx: nodes without torch take part")]


class ExportFailed(FedtideError):
    """The app's training could not be exported to a bundle."""


def packed(app: Path, run_config: ConfigValues, train: TrainWith) -> bytes:
    """The app's bundle; says what of the app stays behind.

    Raises:
        ExportFailed: nodes without torch were asked for, and the app's training cannot be exported.
    """
    if left_out := app_files(app).left_out:
        named = [f"{name} ({why})" for name, why in sorted(left_out.items())]
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        typer.echo(f"left out of the bundle: {', '.join(named[:10])}{more}", err=True)
    if train is TrainWith.flower:
        return bundle(app)
    return bundle(app, {TRAINING: training_bundle(app, run_config).read_bytes()})


def pushed(
    client: Client, app: Path, run_config: ConfigValues, train: TrainWith, *, with_wheels: bool = False, key: str = ""
) -> AppRef:
    """Give an app to the coordinator.

    Args:
        key: the publisher's; empty: the one of the environment or of the present home.

    Raises:
        ConfigError: as `describe`, `bundle` and `gathered`.
        WheelsMissing: there are no wheels for some of the nodes.
    """
    from fedtide.fabric.packages.requirements import not_installed, worth_naming

    described = describe(app)
    for ignored in not_installed(described.dependencies):
        typer.echo(f"{ignored} is not installed: an app runs with the flwr of the installation", err=True)
    named = AppRef(
        name=described.name,
        bundle=client.send(endpoints.put_bundle(packed(app, run_config, train))),
        requirements=worth_naming(described.dependencies) if train is TrainWith.flower else [],
    )
    if with_wheels:
        named = named.model_copy(update={"wheels": _wheels(client, app, described)})
    return signed(named, key)


def _wheels(client: Client, app: Path, described: AppDescription) -> dict[str, BlobRef]:
    """Upload wheels for every kind of machine in the fleet, and for this one, on which aggregators may run."""
    nodes = client.every(endpoints.nodes())
    machines = {Machine(".".join(n.python.split(".")[:2]), n.hardware) for n in nodes if n.python and n.hardware}
    found: dict[str, BlobRef] = {}
    with gathered(app, described.dependencies, {Machine.this(), *machines}) as wheels:
        for file in wheels:
            typer.echo(f"wheel: {file.name}, {file.stat().st_size / 1e6:.1f} MB", err=True)
            found[file.name] = client.send(endpoints.put_bundle(file.read_bytes()))
    return found


def training_bundle(app: Path, run_config: ConfigValues) -> Path:
    """The file of the app's training bundle, made in a process that has torch, or kept from the last time."""
    command = module_command("fedtide.aggregation.training_export", str(app), json.dumps(run_config))
    typer.echo("exporting the training step; this takes a minute the first time", err=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as exc:
        raise ExportFailed(f"the export ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}") from exc
    if "file" not in answer:
        failed = ExportFailed(answer["what"], answer["remedy"])
        failed.exit_code = answer["exit_code"]
        raise failed
    return Path(answer["file"])
