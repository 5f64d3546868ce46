"""The trainer process, seen from the agent: started on demand, niced, killed when it must be.

One process serves all apps, one task at a time, each run in a child of its own; what a run keeps on a node is its
context's state, on disk. The agent talks to the process in JSON lines; tensors pass through files.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.owner_policy import AppRule
from fedtide.edge_agent.sandbox.cgroups import Cgroup
from fedtide.edge_agent.sandbox.levels import Level, is_enough
from fedtide.edge_agent.tasks.app_packages import AppPackages
from fedtide.edge_agent.tasks.app_places import AppPlaces, named_in
from fedtide.edge_agent.tasks.governor import Governor, LimitExceeded
from fedtide.edge_agent.training.job import Job
from fedtide.fabric.errors import CapabilityMissing, RemoteError, TransientError
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.process.families import end_family
from fedtide.fabric.process.metering import descendants, resident_bytes
from fedtide.fabric.process.parent_death import die_with_parent
from fedtide.fabric.process.python import module_command
from fedtide.fabric.tensors.training_bundle import TRAINING

log = logging.getLogger(__name__)

_FLOWER, _ONNX = "fedtide.edge_agent.training.flower", "fedtide.edge_agent.training.onnx"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


_FIRST_SIGNAL = 128
SECRET_VARIABLES = frozenset({"FEDTIDE_JOIN_TOKEN", "FEDTIDE_TOKEN"})
"""Of the agent's environment; apps need none of them."""


class _Served(NamedTuple):
    """What one trainer process can be used for.

    `named`: files that nodes' configuration lets its apps read; `data`: those of the owner's policy, where these need
    to be reached by another user.
    """

    module: str
    network: bool
    named: tuple[Path, ...]
    data: tuple[Path, ...]
    shown: tuple[int, ...]


class TrainerCrashed(RemoteError):
    """The trainer process died under a task (signal, os._exit, out of memory)."""


class Trainer:
    """At most one trainer process, kept warm between tasks."""

    def __init__(
        self, config: AgentConfig, governor: Governor, packages: AppPackages, places: AppPlaces, level: Level
    ) -> None:
        """`level`: what apps are kept in."""
        self._packages = packages
        self._places = places
        self._level = level
        self._wrapped = is_enough(level, "bubblewrap")
        self._config = config
        self._governor = governor
        self._process: asyncio.subprocess.Process | None = None
        self._serves: _Served | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._group = Cgroup.delegated()

    @property
    def resident_bytes(self) -> int:
        """Of the process that serves apps and all that it has started."""
        if self._process is None:
            return 0
        return sum(map(resident_bytes, (self._process.pid, *descendants(self._process.pid))))

    async def train(self, job: Job, app: AppRef, limits: AppRule) -> None:
        """Do one job; its reply is in `job.out_dir` (see fedtide.edge_agent.training).

        Args:
            limits: what the node's owner lets the app use.

        Raises:
            OwnerRefuses: the owner limits what this machine cannot limit.
            CapabilityMissing: this node can run neither the app nor its training bundle, or lacks packages of it.
            TrainerCrashed: the process ended before it answered.
            LimitExceeded: the task exceeded the node's limits and was ended.
            TransientError: its disk is full.
        """
        limits.check_enforceable(by_cgroup=self._group is not None)
        module = trainer_module(self._config.train_runtime, job.app_dir)
        if self._idle is not None:
            self._idle.cancel()
        await self._governor.until_allowed()
        python = await self._packages.python_for(job.app_dir, app) if module == _FLOWER else None
        network = job.confinement is None or limits.network
        data = tuple(limits.data) if self._level == "user" else ()
        shown = self._places.shown() if self._wrapped else ()
        serves = _Served(module, network, tuple(named_in(job.node_config)), data, shown)
        if serves != self._serves or (self._process is not None and self._process.returncode is not None):
            await self.stop()
        if self._group is not None:
            self._group.limit(cpus=limits.cpus, memory_bytes=limits.memory_bytes, processes=limits.processes)
        process = self._process or await self._start(serves)
        assert process.stdin is not None and process.stdout is not None
        try:
            asked = job.model_copy(update={"python": python})
            process.stdin.write(asked.model_dump_json().encode() + b"\n")
            await process.stdin.drain()
            answer = await self._governed(process.pid, process.stdout)
        except ConnectionError:
            answer = b""
        except (asyncio.CancelledError, LimitExceeded):
            await self.stop()
            raise
        if not answer:
            code = self._exit_code(await process.wait())
            self._kill()
            raise TrainerCrashed(f"the trainer process ended ({_describe(code)}) before it answered")
        done = json.loads(answer)
        if not done["done"]:
            raise TransientError(f"the trainer could not write: {done['reason']}", "Free disk space; it is tried again")
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(self._config.train_idle_s, self._kill)

    async def _governed(self, group: int, answers: asyncio.StreamReader) -> bytes:
        """The process's answer; meanwhile the governor pauses it according to the node's limits."""
        watching = asyncio.create_task(self._governor.watch(group), name="governor")
        reading = asyncio.create_task(answers.readline(), name="trainer-answer")
        try:
            await asyncio.wait({watching, reading}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not reading.done():
                watching.result()
            return await reading
        finally:
            for task in (watching, reading):
                task.cancel()
            await asyncio.gather(watching, reading, return_exceptions=True)

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()

    def _kill(self) -> None:
        process, self._process, self._serves = self._process, None, None
        if process is not None and process.returncode is None:
            end_family(process.pid)

    def _exit_code(self, code: int) -> int:
        """Bubblewrap tells of a signal as shells do."""
        return _FIRST_SIGNAL - code if self._wrapped and code > _FIRST_SIGNAL else code

    async def _start(self, serves: _Served) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        if self._config.train_threads is not None:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(self._config.train_threads))
        work = self._places.trainer
        work.mkdir(parents=True, exist_ok=True)
        before = []
        if self._wrapped:
            before = self._places.bubblewrapped(network=serves.network, named=serves.named, data=serves.data)
        with (work / "trainer.log").open("wb") as logfile:  # apps write into the logs of their runs
            self._process = await asyncio.create_subprocess_exec(
                *before,
                *module_command(serves.module),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=logfile,
                cwd=work,
                env=environment,
                preexec_fn=self._become_polite,
                start_new_session=True,  # a process group: it is paused and ended with all it started
            )
        self._serves = serves
        log.info("trainer.started", extra={"pid": self._process.pid, "runs": serves.module, "sandbox": self._level})
        return self._process

    def _become_polite(self) -> None:
        if self._group is not None:
            self._group.enter()
        os.nice(self._config.train_nice)
        if (most := self._config.limits.memory_bytes) is not None:
            # Private memory, not address space: numeric libraries reserve far more than they use.
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        die_with_parent()


def trainer_module(runtime: str, app_dir: Path) -> str:
    """The module of the process that trains this app here.

    With runtime `auto` it runs the app's own code if flwr and torch are installed, else the app's training bundle.

    Raises:
        CapabilityMissing: it has neither.
    """
    bundled, flower = (app_dir / TRAINING).is_file(), find_spec("flwr") is not None
    if runtime == "onnx" or (runtime == "auto" and bundled and not (flower and find_spec("torch") is not None)):
        if bundled:
            return _ONNX
        raise CapabilityMissing(
            "this node trains without torch, and the app carries no training bundle",
            "Start the run with `--train onnx`, or set train_runtime to flower on a node with flwr",
        )
    if not flower:
        raise CapabilityMissing(
            "this node cannot run Flower apps: flwr is not installed, and the app carries no training bundle",
            "pip install 'fedtide[train]' on the node, or start the run with `--train onnx`",
        )
    return _FLOWER


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
