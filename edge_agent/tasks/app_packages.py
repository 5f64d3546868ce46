"""The packages of an app on this node: which interpreter has them, made if this node's owner allows it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from fedtide.edge_agent.config import AgentConfig
from fedtide.fabric.errors import CapabilityMissing, FedtideError, TransientError
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.packages.keeping import hold
from fedtide.fabric.packages.rules import LOCK, Wanted
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.process.parent_death import die_with_parent
from fedtide.fabric.process.python import module_command
from fedtide.fabric.tensors.blobs import BlobRef

log = logging.getLogger(__name__)

Fetch = Callable[[BlobRef, Path], Awaitable[None]]
"""Fetches a blob of an app into a file."""
_NICE = 10
LONGEST_LINE = 1024 * 1024


class AppPackages:
    """Finds the interpreter for an app; made environments are shared by all apps that need the same."""

    def __init__(self, config: AgentConfig, fetch: Fetch, show: Callable[[str], None]) -> None:
        self._rules = config.packages
        self._root = (config.packages.folder or config.data_dir / "environments").resolve()
        self._fetch = fetch
        self._show = show
        self._found: dict[str, Path | None] = {}
        """By digest of the app."""
        self._held: tuple[Path, int] | None = None
        """The environment in use, and what keeps it from being removed."""

    async def python_for(self, app_dir: Path, app: AppRef) -> Path | None:
        """The interpreter that has what an app needs; None: the agent's own. It stays until another is asked for.

        Raises:
            CapabilityMissing: a package is missing and may not, or cannot, be installed.
            TransientError: there is no room now.
            FedtideError: the app's requirements cannot be read, or a wheel of it is not there.
        """
        digest = app.bundle.digest
        known = self._found.get(digest)
        if known is not None:
            self._hold(known)
        if digest not in self._found or (known is not None and not known.exists()):
            self._found[digest] = await self._find(app_dir, app)
        return self._found[digest]

    def _hold(self, python: Path) -> None:
        if self._held is not None and self._held[0] == python:
            return
        handle = hold(python)
        if self._held is not None:
            os.close(self._held[1])
        self._held = python, handle

    async def _find(self, app_dir: Path, app: AppRef) -> Path | None:
        from fedtide.fabric.packages.requirements import unmet  # comes with flwr: not on every node

        dependencies = describe(app_dir).dependencies
        if not (app_dir / LOCK).is_file() and not unmet(dependencies):
            return None
        self._show("installing packages")
        (self._root / ".wheels").mkdir(parents=True, exist_ok=True)
        wheels = {name: ref.digest for name, ref in app.wheels.items()} if self._rules.wheels else {}
        wanted = Wanted(
            root=self._root, rules=self._rules, app_dir=app_dir.resolve(), dependencies=dependencies, wheels=wheels
        )
        process = await asyncio.create_subprocess_exec(
            *module_command("fedtide.fabric.packages"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            preexec_fn=_be_polite,
            start_new_session=True,
        )
        scratch = Path(mkdtemp(dir=self._root / ".wheels"))
        try:
            return await self._made(process, wanted, app, scratch)
        finally:
            self._show("training")
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # uv too, if the task was cancelled
            await process.wait()
            shutil.rmtree(scratch, ignore_errors=True)

    async def _made(
        self, process: asyncio.subprocess.Process, wanted: Wanted, app: AppRef, scratch: Path
    ) -> Path | None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(wanted.model_dump_json().encode() + b"\n")
        await process.stdin.drain()
        while line := await process.stdout.readline():
            told = json.loads(line)
            if "python" in told:
                python = Path(told["python"]) if told["python"] is not None else None
                if python is not None:
                    self._hold(python)  # before the installer lets go of it
                log.info("app.packages", extra={"python": told["python"] or "the agent's own"})
                return python
            if "error" in told:
                raise _ERRORS.get(told["error"], FedtideError)(told["what"], told["remedy"])
            size = sum(app.wheels[name].size_bytes for name in told["wheels"])
            if size > self._rules.max_bytes:
                raise CapabilityMissing(
                    f"the app's wheels have {size / 1e6:.0f} MB, the owner allows {self._rules.max_bytes / 1e6:.0f} MB",
                    "Raise packages.max_bytes on the node",
                )
            for name in told["wheels"]:
                await self._fetch(app.wheels[name], scratch / name)
            process.stdin.write(f"{scratch}\n".encode())
            await process.stdin.drain()
        raise CapabilityMissing("the app's packages cannot be installed: the installer ended", "See the agent's log")


def _be_polite() -> None:
    os.nice(_NICE)
    die_with_parent()


_ERRORS: dict[str, type[FedtideError]] = {"CapabilityMissing": CapabilityMissing, "TransientError": TransientError}
