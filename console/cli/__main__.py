"""Assembles the command line; every error becomes one line that says what to do next."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from fedtide.console.cli import backup_commands, people_commands, storage_commands, system_commands
from fedtide.console.cli.app_commands import apps_app
from fedtide.console.cli.audit_commands import audit_app
from fedtide.console.cli.cost_commands import budgets_app, costs_app, prices_app
from fedtide.console.cli.event_commands import events_app
from fedtide.console.cli.fleet_commands import fleet_app
from fedtide.console.cli.identity_commands import identity_app
from fedtide.console.cli.k8s_commands import k8s_app
from fedtide.console.cli.model_commands import infer, models_app
from fedtide.console.cli.node_commands import node_app
from fedtide.console.cli.region_commands import regions_app
from fedtide.console.cli.rollout_commands import rollouts_app
from fedtide.console.cli.run_commands import rounds_app, runs_app
from fedtide.console.cli.samples_commands import samples_app
from fedtide.console.cli.tenant_commands import tenant_app
from fedtide.console.cli.trigger_commands import triggers_app
from fedtide.console.cli.trust_commands import trust_app
from fedtide.console.cli.try_command import try_
from fedtide.console.cli.why_command import why
from fedtide.console.home import Home
from fedtide.console.output import say
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.validation import first_problem

INTERNAL = 70
CANNOT_WRITE = 74
INTERRUPTED = 130

app = typer.Typer(
    name="fedtide",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning from cloud to edge: Flower apps over NATS, ONNX at the edge.",
)
for command in (
    system_commands.up,
    system_commands.down,
    system_commands.status,
    storage_commands.storage,
    storage_commands.gc,
    backup_commands.backup,
    backup_commands.restore,
    system_commands.demo,
    infer,
    why,
    people_commands.login,
    people_commands.logout,
    people_commands.whoami,
    system_commands.agent,
    system_commands.coordinator,
):
    app.command()(command)
app.command("try")(try_)
app.add_typer(apps_app, name="app")
app.add_typer(fleet_app, name="fleet")
app.add_typer(identity_app, name="identity")
app.add_typer(node_app, name="node")
app.add_typer(regions_app, name="region")
app.add_typer(k8s_app, name="k8s")
app.add_typer(runs_app, name="run")
app.add_typer(rounds_app, name="round")
app.add_typer(models_app, name="model")
app.add_typer(trust_app, name="trust")
app.add_typer(people_commands.service_tokens_app, name="token")
app.add_typer(tenant_app, name="tenant")
app.add_typer(audit_app, name="audit")
app.add_typer(rollouts_app, name="rollout")
app.add_typer(samples_app, name="samples")
app.add_typer(triggers_app, name="trigger")
app.add_typer(events_app, name="events")
app.add_typer(costs_app, name="cost")
app.add_typer(prices_app, name="price")
app.add_typer(budgets_app, name="budget")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            say(f"fedtide {version('fedtide')}")
        except PackageNotFoundError:
            say("fedtide (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="The version of this command", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def main() -> int:
    """Run one command; returns its exit code. Nothing that a command raises reaches the screen as a traceback."""
    if any("\ud800" <= letter <= "\udfff" for word in sys.argv for letter in word):
        _complain("an argument is not UTF-8 text")
        return ConfigError.exit_code
    if sys.stdout is None:  # it was closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    try:
        app(prog_name="fedtide", standalone_mode=True)
        return 0
    except SystemExit as exc:
        return _flushed(exc.code if isinstance(exc.code, int) else int(exc.code is not None))
    except FedtideError as exc:
        _complain(str(exc))
        return exc.exit_code
    except ValidationError as exc:
        _complain(first_problem(exc))
        return ConfigError.exit_code
    except BrokenPipeError:
        _discard_output()
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as exc:
        _complain(f"{exc.filename or 'output'}: {exc.strerror or exc}")
        _discard_output()
        return CANNOT_WRITE
    except Exception as exc:  # the one place where an error of ours becomes a line, and its traceback a file
        _complain(f"an error of fedtide itself, {type(exc).__name__}: {_one_line(exc)}{_kept_traceback()}")
        return INTERNAL


def _flushed(code: int) -> int:
    """Flush the output before the process ends, so that a full disk is noticed; returns the exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return code or 1
    except OSError as exc:
        _complain(f"output: {exc.strerror or exc}")
        _discard_output()
        return code or CANNOT_WRITE
    return code


def _complain(text: str) -> None:
    line = f"fedtide: {text}"
    print(line.encode("utf-8", "replace").decode("utf-8").replace("\n", " "), file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _discard_output() -> None:
    """Discard output that has no reader or cannot be written, so that Python does not retry at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _kept_traceback() -> str:
    for folder in (Home.find().logs, Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, prefix="error-", suffix=".txt", delete=False) as file:
                traceback.print_exc(file=file)
            return f". Its traceback is in {file.name}"
        except OSError:
            continue
    return ""


if __name__ == "__main__":
    sys.exit(main())
