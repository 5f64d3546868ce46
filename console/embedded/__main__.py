"""`python -m fedtide.console.embedded`: the supervisor process that `fedtide up` starts."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

from fedtide.console.embedded.plan import Layout, lay_out
from fedtide.console.embedded.supervisor import Supervisor, locked
from fedtide.console.home import SUPERVISOR_SAYS, Home
from fedtide.fabric import logs
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.process.until_signalled import until_signalled

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _check(layout: Layout, which: str, option: str) -> None:
    """Raises ConfigError if a process does not take its configuration: before anything is started."""
    argv = next(child.argv for child in layout.children if child.name.startswith(which))
    done = subprocess.run([*argv, "--check"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        said = lines[-1]
        for start in ("fedtide agent: ", "agent config.", "agent.", "fedtide coordinator: ", f"{argv[-1]}."):
            said = said.removeprefix(start)
        raise ConfigError(option, said)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--regions", required=True)
    parser.add_argument("--nodes-per-region", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--coordinators", type=int, default=1)
    parser.add_argument("--regional-aggregators", action="store_true")
    parser.add_argument("--agent", type=json.loads, default={})
    parser.add_argument("--room", required=True)
    parser.add_argument("--at-rest-key", type=Path, default=None)
    parser.add_argument("--app-index", default="")
    parser.add_argument("--coordinator", type=json.loads, default={})
    arguments = parser.parse_args()
    logs.to_stderr()
    home = Home.find()
    try:
        with locked(home):
            regions, nodes = arguments.regions.split(","), arguments.nodes_per_region
            port, coordinators, regional = arguments.port, arguments.coordinators, arguments.regional_aggregators
            layout = lay_out(
                home,
                regions,
                nodes,
                port,
                coordinators,
                regional=regional,
                agent=arguments.agent,
                room=arguments.room,
                at_rest_key=arguments.at_rest_key,
                app_index=arguments.app_index,
                coordinator=arguments.coordinator,
            )
            if arguments.agent:
                _check(layout, "agent-", "--agent-set")
            if arguments.coordinator:
                _check(layout, "coordinator", "--coordinator-set")
            asyncio.run(until_signalled(Supervisor(home, layout).run(asyncio.Event()), ENDS))
    except FedtideError as exc:
        print(f"{SUPERVISOR_SAYS}{exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
