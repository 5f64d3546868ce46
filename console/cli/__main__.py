"""Puts the command line together; errors become one line that says what to do next."""

from __future__ import annotations

import sys

import typer

from fedtide.console.cli import system_commands
from fedtide.console.cli.app_commands import apps_app
from fedtide.console.cli.event_commands import events_app
from fedtide.console.cli.fleet_commands import fleet_app
from fedtide.console.cli.k8s_commands import k8s_app
from fedtide.console.cli.model_commands import infer, models_app
from fedtide.console.cli.rollout_commands import rollouts_app
from fedtide.console.cli.run_commands import rounds_app, runs_app
from fedtide.console.cli.samples_commands import samples_app
from fedtide.console.cli.trigger_commands import triggers_app
from fedtide.console.cli.why_command import why
from fedtide.fabric.errors import FedtideError

app = typer.Typer(
    name="fedtide",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning from cloud to edge: Flower apps over NATS, ONNX at the edge.",
)
for command in (
    system_commands.up,
    system_commands.down,
    system_commands.status,
    system_commands.demo,
    infer,
    why,
    system_commands.agent,
    system_commands.coordinator,
):
    app.command()(command)
app.add_typer(apps_app, name="app")
app.add_typer(fleet_app, name="fleet")
app.add_typer(k8s_app, name="k8s")
app.add_typer(runs_app, name="run")
app.add_typer(rounds_app, name="round")
app.add_typer(models_app, name="model")
app.add_typer(rollouts_app, name="rollout")
app.add_typer(samples_app, name="samples")
app.add_typer(triggers_app, name="trigger")
app.add_typer(events_app, name="events")


def main() -> None:
    try:
        app(prog_name="fedtide")
    except FedtideError as exc:
        print(f"fedtide: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
