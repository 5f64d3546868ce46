"""`python -m fedtide.console.embedded`: the supervisor process that `fedtide up` starts."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys

from fedtide.console.embedded.home import Home
from fedtide.console.embedded.plan import lay_out
from fedtide.console.embedded.supervisor import Supervisor, locked
from fedtide.fabric import logs
from fedtide.fabric.errors import FedtideError


async def _until_signalled(supervisor: Supervisor) -> None:
    task = asyncio.create_task(supervisor.run(asyncio.Event()))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--regions", required=True)
    parser.add_argument("--nodes-per-region", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--coordinators", type=int, default=1)
    parser.add_argument("--regional-aggregators", action="store_true")
    parser.add_argument("--agent", type=json.loads, default={})
    arguments = parser.parse_args()
    logs.to_stderr()
    home = Home.find()
    try:
        with locked(home):
            regions, nodes = arguments.regions.split(","), arguments.nodes_per_region
            port, coordinators, regional = arguments.port, arguments.coordinators, arguments.regional_aggregators
            layout = lay_out(home, regions, nodes, port, coordinators, regional=regional, agent=arguments.agent)
            asyncio.run(_until_signalled(Supervisor(home, layout)))
    except FedtideError as exc:
        print(f"fedtide up: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
