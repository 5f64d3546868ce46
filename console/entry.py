"""The `fedtide` command: hands over to the part that is asked for, loading nothing else.

`fedtide agent` must work on a node that has only the agent's few dependencies.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec


def main() -> int:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["agent"]:
        sys.argv[:2] = ["fedtide agent"]
        runpy.run_module("fedtide.edge_agent", run_name="__main__")
        return 0
    if find_spec("typer") is None:
        print(
            "fedtide: this command needs the control plane. Install it: pip install 'fedtide[control]'", file=sys.stderr
        )
        return 69
    runpy.run_module("fedtide.console.cli", run_name="__main__")
    return 0
