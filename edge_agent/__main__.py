"""`python -m fedtide.edge_agent [--config FILE]`, also reached as `fedtide agent`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from fedtide.edge_agent.agent import Agent
from fedtide.edge_agent.config import load
from fedtide.edge_agent.sandbox.levels import level_of
from fedtide.fabric import logs
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.process.files import keep_caches_in
from fedtide.fabric.process.until_signalled import until_signalled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fedtide agent", description="Run the agent of one edge node.")
    parser.add_argument("--config", type=Path, help="TOML or JSON file; FEDTIDE_* variables override it")
    parser.add_argument("--check", action="store_true", help="Only check the configuration")
    arguments = parser.parse_args(argv)
    logs.to_stderr()
    try:
        config = load(arguments.config)
        level_of(config.sandbox, config.apps_user)
        if not arguments.check:
            keep_caches_in(config.data_dir)
            asyncio.run(until_signalled(Agent(config).run()))
            logging.getLogger(__name__).info("agent.stopped")
    except FedtideError as exc:
        print(f"fedtide agent: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
