"""The supervisor: starts the children of a layout, restarts what dies, and leaves nothing behind.

Children die with the supervisor even when it is killed outright (the kernel sees to it).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from fedtide.console import endpoints
from fedtide.console.client import Client
from fedtide.console.embedded import full_disk
from fedtide.console.embedded.plan import MAX_NODES, Broker, Child, Layout
from fedtide.console.home import Home, UpState
from fedtide.fabric.errors import ConfigError, FedtideError, TransientError
from fedtide.fabric.messages.requests import TokenRequest
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.parent_death import die_with_parent

log = logging.getLogger(__name__)

READY_WITHIN_S = 120.0
STOP_WITHIN_S = 5.0
FIRST_BACKOFF_S = 0.2
LAST_BACKOFF_S = 15.0
CANNOT_START = 126
GIVE_UP_AFTER = 8
"""Deaths in a row, each within seconds of its start, after which a start of the installation has failed. Once it was
up, no child is given up: what works goes on, and a child that keeps dying is started again, ever more rarely."""


class ChildGaveUp(FedtideError):
    """A child that cannot be kept running; its log says why."""


class Supervisor:
    """Keeps one installation running until it is cancelled."""

    def __init__(self, home: Home, layout: Layout) -> None:
        self._home = home
        self._layout = layout
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._was_up = False

    async def run(self, ready: asyncio.Event) -> None:
        """Start everything, set `ready`, and watch until cancelled. The caller holds the home's lock.

        Raises:
            ChildGaveUp: a child that all others need cannot be started.
        """
        try:
            async with asyncio.TaskGroup() as group:
                await self._start_all(group)
                self._write_state()
                self._was_up = True
                ready.set()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._home.up_file.unlink(missing_ok=True)
            await self._stop_all()

    async def _start_all(self, group: asyncio.TaskGroup) -> None:
        for child in self._layout.children:
            started = asyncio.Event()
            group.create_task(self._keep(child, started), name=child.name)
            await started.wait()
            if child.port is not None:
                await _until(partial(_is_open, child.port), child.name)
            if child.broker is not None:
                group.create_task(self._heal(child.name, child.broker))
            if child.name == "coordinator":
                await _until(self._home.endpoint_file_of(child.name).exists, "the coordinator's API")
                await asyncio.to_thread(self._write_join_token)

    def _write_join_token(self) -> None:
        """Write the join token that agents enrol with, as in a cluster. Agents with credentials do not need it."""
        asked = TokenRequest(uses=MAX_NODES, ttl_s=3600, replaces=True)
        client = Client.of(self._home, self._layout.apis, by="fedtide up")
        write_secret(self._home.join_token_file, client.send(endpoints.create_join_token(asked)).token)

    def _write_state(self) -> None:
        state = UpState(
            pid=os.getpid(),
            apis=list(self._layout.apis),
            hub_url=self._layout.hub_url,
            regions=list(self._layout.regions),
            nodes=list(self._layout.nodes),
        )
        write_atomically(self._home.up_file, state.model_dump_json(indent=2).encode())

    async def _keep(self, child: Child, started: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        backoff, early_deaths = FIRST_BACKOFF_S, 0
        while True:
            began = loop.time()
            try:
                process = await self._spawn(child)
            except OSError as exc:  # no file, process or room left: it may be there again soon
                log.warning("child.not_started", extra={"child": child.name, "reason": str(exc)})
                code = CANNOT_START
            else:
                started.set()
                code = await process.wait()
            log.warning("child.ended", extra={"child": child.name, "code": code})
            if loop.time() - began > LAST_BACKOFF_S:
                backoff, early_deaths = FIRST_BACKOFF_S, 0
            early_deaths += 1
            hopeless = code == ConfigError.exit_code or early_deaths >= GIVE_UP_AFTER
            if hopeless and not self._was_up and not child.name.startswith("agent-"):
                raise ChildGaveUp(
                    f"{child.name} ended with code {code}: {self._last_line(child)}", f"See {self._logfile(child)}"
                )
            await asyncio.sleep(backoff)
            backoff = min(LAST_BACKOFF_S, backoff * 2)

    async def _heal(self, name: str, broker: Broker) -> None:
        """Restart a server that refuses writes because its disk was full, as soon as there is room."""
        while True:
            await full_disk.until_writes_are_refused(broker.monitor)
            log.warning("broker.refuses_writes", extra={"child": name})
            await full_disk.until_there_is_room(broker.store)
            process = self._processes[name]
            if process.returncode is None:
                process.terminate()

    async def _spawn(self, child: Child) -> asyncio.subprocess.Process:
        environment = {**os.environ, **child.environment, "FEDTIDE_LIFELINE_PID": str(os.getpid())}
        with self._logfile(child).open("ab") as logfile:
            process = await asyncio.create_subprocess_exec(
                *child.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=logfile,
                stderr=logfile,
                env=environment,
                preexec_fn=die_with_parent,
            )
        self._processes[child.name] = process
        return process

    def pid_of(self, name: str) -> int | None:
        """The process of a child, if it lives."""
        process = self._processes.get(name)
        return process.pid if process is not None and process.returncode is None else None

    def _logfile(self, child: Child) -> Path:
        return self._home.logs / f"{child.name}.log"

    def _last_line(self, child: Child) -> str:
        lines = self._logfile(child).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    async def _stop_all(self) -> None:
        await self._stop(lambda name: name.startswith("agent-"))
        await self._stop(lambda name: name.startswith("coordinator"))
        # Only now: a running coordinator would start them again.
        self._stop_aggregators()
        await self._stop(lambda name: name in ("collector", "release-authority") or name.startswith("regional-"))
        await self._stop(lambda name: name == "hub" or name.startswith("leaf-"))

    async def _stop(self, chosen: Callable[[str], bool]) -> None:
        await asyncio.gather(*(_stop(p) for name, p in self._processes.items() if chosen(name)))

    def _stop_aggregators(self) -> None:
        for note in (self._home.root / "coordinator" / "runs").glob("*/aggregator.pid"):
            try:
                os.kill(int(json.loads(note.read_text())["pid"]), signal.SIGKILL)
            except (OSError, ValueError, KeyError) as exc:
                log.debug("aggregator.gone", extra={"reason": str(exc)})


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """One installation a home, also after a crash: the kernel drops the lock with its holder.

    Raises:
        ConfigError: another one is up; nothing of it has been touched.
    """
    home.root.mkdir(parents=True, exist_ok=True)
    with home.lock_file.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            remedy = "`fedtide down` ends it; or set FEDTIDE_HOME"
            raise ConfigError(str(home.root), "a fedtide is already up here", remedy) from exc
        yield


async def _until(holds: Callable[[], bool], what: str) -> None:
    """Poll during start-up: other processes give no signal when they are ready."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + READY_WITHIN_S
    while not holds():
        if loop.time() > deadline:
            raise TransientError(f"{what} is not there after {READY_WITHIN_S:.0f} s")
        await asyncio.sleep(0.05)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_WITHIN_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@asynccontextmanager
async def running(home: Home, layout: Layout) -> AsyncIterator[None]:
    """The installation, up for the time of the block."""
    ready = asyncio.Event()
    supervisor = asyncio.create_task(Supervisor(home, layout).run(ready))
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({supervisor, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if supervisor.done():
            supervisor.result()
        yield
    finally:
        waiting.cancel()
        supervisor.cancel()
        await asyncio.gather(supervisor, waiting, return_exceptions=True)
