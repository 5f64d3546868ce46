"""From a desired state to a served release, phase by phase, reported as it goes.

`offered -> downloading -> verified -> staged -> smoke_tested -> active -> confirmed`. The old
release serves until the new one has passed its smoke inference; `confirmed` is said only after
an inference through the model that is being served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from edge_agent.config import AgentConfig
from edge_agent.inference_server import InferenceServer
from edge_agent.model_store import Current, ModelStore
from edge_agent.sessions import Model
from fabric.blobs import BlobRef
from fabric.broker import Broker
from fabric.errors import FedtideError, TransientError
from fabric.rollout_plan import NodePhase
from fabric.subjects import Subjects
from fabric.wire import Desired

log = logging.getLogger(__name__)

Report = Callable[[Desired, NodePhase, str], Awaitable[None]]
RETRY_S = 1.0


class _Superseded(FedtideError):
    """A newer desired state arrived."""


class Activation:
    """Brings the node to its latest desired state, one model after the other."""

    def __init__(self, config: AgentConfig, broker: Broker, server: InferenceServer, report: Report) -> None:
        self._config = config
        self._broker = broker
        self._server = server
        self._report = report
        self._subjects = Subjects(config.tenant)
        self._store = ModelStore(config.data_dir / "models")
        self._latest: dict[str, Desired] = {}
        self._changed: asyncio.Queue[str] = asyncio.Queue()

    def resume(self) -> None:
        """Serve what the disk says, before the network is there; fall back to the last good release."""
        for current in self._store.current():
            for release in (current.release, current.previous):
                if release is not None and self._try_to_serve(release):
                    break

    def _try_to_serve(self, release: BlobRef) -> bool:
        try:
            self._server.swap(self._load(release))
        except FedtideError as exc:
            log.error("release.unusable", extra={"release": release.digest, "reason": str(exc)})
            return False
        return True

    async def want(self, desired: Desired) -> None:
        """Take note of a desired state; the highest counter of a model wins."""
        known = self._latest.get(desired.model)
        if known is None or desired.counter > known.counter:
            self._latest[desired.model] = desired
            self._changed.put_nowait(desired.model)

    async def run(self) -> None:
        """Work towards the desired state for ever."""
        while True:
            await self._apply(self._latest[await self._changed.get()])

    async def _apply(self, desired: Desired) -> None:
        current = self._store.current_of(desired.model)
        if current is not None and desired.counter < current.counter:
            reason = f"counter {desired.counter} is lower than {current.counter}, which this node has seen"
            await self._report(desired, "rejected", reason)
            return
        if current is not None and desired.counter == current.counter:
            same = self._server.serving().get(desired.model) == (desired.release.digest if desired.release else None)
            await self._report(desired, "confirmed" if same else "failed", "" if same else "failed before a restart")
            return
        try:
            await self._activate(desired, current)
        except _Superseded:
            await self._report(desired, "superseded", "a newer desired state arrived")
        except FedtideError as exc:
            self._remember_failure(desired, current)
            await self._report(desired, "failed", str(exc))

    async def _activate(self, desired: Desired, current: Current | None) -> None:
        previous = current.release if current is not None else None
        if desired.release is None:
            self._server.remove(desired.model)
            self._store.set_current(_current(desired, None, previous))
            await self._report(desired, "confirmed", "nothing is served any more")
            return
        await self._enter(desired, "downloading")
        staging = await self._fetch(desired, desired.release)
        await self._enter(desired, "verified")
        await asyncio.to_thread(self._store.stage, desired.release, staging)
        await self._enter(desired, "staged")
        model = await asyncio.to_thread(self._load, desired.release)
        await self._enter(desired, "smoke_tested")
        self._store.set_current(_current(desired, desired.release, previous))
        self._server.swap(model)
        await self._report(desired, "active", "")
        await asyncio.to_thread(model.smoke_test, self._store.folder(desired.release))
        await self._report(desired, "confirmed", "")

    async def _enter(self, desired: Desired, phase: NodePhase) -> None:
        if self._latest[desired.model] is not desired:
            raise _Superseded("superseded")
        await self._report(desired, phase, "")

    async def _fetch(self, desired: Desired, release: BlobRef) -> Path:
        while True:
            try:
                return await self._store.fetch(self._broker, self._subjects, release)
            except TransientError as exc:
                if self._latest[desired.model] is not desired:
                    raise _Superseded("superseded") from exc
                log.warning("release.waits", extra={"release": release.digest, "reason": str(exc)})
                await asyncio.sleep(RETRY_S)

    def _load(self, release: BlobRef) -> Model:
        folder = self._store.folder(release)
        model = Model(release, self._store.manifest(release), folder, self._config.inference_threads)
        model.smoke_test(folder)
        return model

    def _remember_failure(self, desired: Desired, current: Current | None) -> None:
        release = current.release if current is not None else None
        previous = current.previous if current is not None else None
        self._store.set_current(_current(desired, release, previous))


def _current(desired: Desired, release: BlobRef | None, previous: BlobRef | None) -> Current:
    return Current(
        model=desired.model, counter=desired.counter, rollout=desired.rollout, release=release, previous=previous
    )
