"""`fedtide up`, `down`, `status`, `coordinator`, `agent`, `demo`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.app_bundles import Train, TrainWith
from fedtide.console.cli import grammar
from fedtide.console.client import Client
from fedtide.console.home import SUPERVISOR_SAYS, Home, UpState
from fedtide.console.output import Format, Output, say, show_fields
from fedtide.console.servers import SERVER
from fedtide.fabric.errors import ConfigError, FedtideError, NotFound, TransientError
from fedtide.fabric.process.parent_death import end_with_parent
from fedtide.fabric.process.pid_file import is_alive
from fedtide.fabric.process.python import module_command

UP_WITHIN_S = 180.0
DOWN_WITHIN_S = 30.0
INTERRUPTED = 130


class UpFailed(FedtideError):
    """The supervisor ended on its own; its exit code becomes that of this command."""

    def __init__(self, what: str, remedy: str, code: int) -> None:
        super().__init__(what, remedy)
        self.exit_code = code or 1


def up(
    regions: Annotated[str, typer.Option(help="Made-up regions, one leaf server each")] = "eu-west,us-east,ap-south",
    nodes_per_region: Annotated[int, typer.Option(min=1, help="Agents in each region")] = 2,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the API; 0: any free one")] = 0,
    coordinators: Annotated[int, typer.Option(min=1, help="More than one: the others stand by")] = 1,
    regional_aggregators: Annotated[bool, typer.Option(help="A process in each region that sums its updates")] = False,
    agent_set: Annotated[list[str] | None, typer.Option(help="A field of every agent, key=value; repeat")] = None,
    room: Annotated[str, typer.Option(help="What each server may store, e.g. 500MB")] = "64GB",
    at_rest_key: Annotated[
        Path | None, typer.Option(help="Encrypt what servers store with the key in this file")
    ] = None,
    app_index: Annotated[
        str, typer.Option(help="Index for packages that apps need: a URL, or `default`: as uv is set up here")
    ] = "",
    coordinator_set: Annotated[
        list[str] | None, typer.Option(help="A field of the coordinator, e.g. traces={endpoint: URL}; repeat")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once everything is up")] = False,
) -> None:
    """Start everything on this machine: hub, leaves, coordinator, agents. Ctrl-C ends it all."""
    fields = {
        key: grammar.value("--agent-set", key, text) for key, text in grammar.pairs("--agent-set", agent_set or [])
    }
    more = {
        key: grammar.value("--coordinator-set", key, text)
        for key, text in grammar.pairs("--coordinator-set", coordinator_set or [])
    }
    home = Home.find()
    home.logs.mkdir(parents=True, exist_ok=True)
    if not detach:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
    command = module_command("fedtide.console.embedded", "--regions", regions)
    command += ["--nodes-per-region", str(nodes_per_region), "--port", str(port), "--coordinators", str(coordinators)]
    command += ["--regional-aggregators"] if regional_aggregators else []
    command += ["--agent", json.dumps(fields), "--room", room]
    command += ["--app-index", app_index, "--coordinator", json.dumps(more)]
    command += ["--at-rest-key", str(at_rest_key.absolute())] if at_rest_key is not None else []
    logfile = home.logs / "supervisor.log"
    with logfile.open("a") as file:
        since = file.tell()
        bound = None if detach else end_with_parent
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, preexec_fn=bound)
    try:
        state = _until_up(home, process, logfile, since)
        say(f"up: {len(state.nodes)} nodes in {', '.join(state.regions)}; API {state.apis[0]}; logs in {home.logs}")
        say(f"page: {state.apis[0]}/ui/ (its token is in {home.api_token_file})")
        if not detach:
            say("Ctrl-C ends it.")
            code = process.wait()
            raise UpFailed(_reason(logfile, since), f"See {logfile}", code) if code else typer.Exit()
    except KeyboardInterrupt:
        say("going down ...")
        process.terminate()
        process.wait(DOWN_WITHIN_S)
        raise typer.Exit(INTERRUPTED if detach else 0) from None


def _until_up(home: Home, process: subprocess.Popen[bytes], logfile: Path, since: int) -> UpState:
    """Poll until everything is up: other processes give no signal when they are ready."""
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            raise UpFailed(_reason(logfile, since), "" if code == ConfigError.exit_code else f"See {logfile}", code)
        try:
            state = home.state()
            if state.pid == process.pid and _all_online(home, state):
                return state
        except (NotFound, TransientError):
            pass
        time.sleep(0.1)
    process.terminate()
    raise TransientError(f"not everything was up after {UP_WITHIN_S:.0f} s", f"See {home.logs}")


def _reason(logfile: Path, since: int) -> str:
    """Why a supervisor ended, from what was logged since byte `since`; another one, which is up, writes there too."""
    lines = logfile.read_bytes()[since:].decode(errors="replace").strip().splitlines() or ["no output"]
    said = [line for line in lines if line.startswith(SUPERVISOR_SAYS)] or lines
    return said[-1].removeprefix(SUPERVISOR_SAYS)


def _all_online(home: Home, state: UpState) -> bool:
    return Client.of(home, state.apis).send(endpoints.status()).nodes.online >= len(state.nodes)


def down() -> None:
    """End the installation that is up in the current home."""
    home = Home.find()
    state = home.state()
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_WITHIN_S
    while is_alive(state.pid):
        if time.monotonic() > deadline:
            raise TransientError(f"the supervisor (pid {state.pid}) does not end", "Kill it; its children follow")
        time.sleep(0.05)
    say("down")


def status(output: Output = Format.table) -> None:
    """What is up, and what it is doing."""
    here: dict[str, object] = {}
    if not os.environ.get(SERVER):
        here = Home.find().state().model_dump(include={"pid", "apis", "hub_url"})
    show_fields({**here, **Client.find().send(endpoints.status()).model_dump(mode="json")}, output)


def coordinator(
    config: Annotated[Path, typer.Option("--config", help="JSON configuration, see docs/configuration.md")],
) -> None:
    """Run a coordinator in the foreground."""
    os.execv(sys.executable, module_command("fedtide.coordinator", str(config)))


def agent(
    config: Annotated[Path | None, typer.Option("--config", help="TOML or JSON file; FEDTIDE_* go over it")] = None,
) -> None:
    """Run the agent of one edge node in the foreground."""
    command = module_command("fedtide.edge_agent", *(["--config", str(config)] if config else []))
    os.execv(sys.executable, command)


def demo(
    regions: Annotated[str, typer.Option(help="Made-up regions")] = "eu-west,us-east,ap-south",
    nodes_per_region: Annotated[int, typer.Option(min=1)] = 2,
    train: Train = TrainWith.flower,
) -> None:
    """The whole main job on real data: train, release, roll out region by region, infer, compare."""
    from fedtide.console.demo.story import tell

    raise typer.Exit(tell(regions.split(","), nodes_per_region, train))
