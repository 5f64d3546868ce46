"""`python -m tests.faults.agent_that_dies PHASE --config FILE`: an agent that is killed once it reported a phase."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from fedtide.edge_agent.__main__ import main
from fedtide.edge_agent.agent import Agent

_report = Agent._report_phase


async def _report_and_die(self: Agent, desired: Any, phase: Any, reason: str, wan_bytes: int) -> None:
    await _report(self, desired, phase, reason, wan_bytes)
    if phase == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Agent._report_phase = _report_and_die
    sys.exit(main(sys.argv[2:]))
