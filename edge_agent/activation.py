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
from fabric.rollout_plan import Desired, NodePhase
from fabric.subjects import Subjects

log = logging.getLogger(__name__)

Report = Callable[[Desired, NodePhase, str], Awaitable[None]]
RETRY_S = 1.0


class _Superseded(FedtideError):
    """A newer desired state arrived."""


class Activation:
    """Brings the node to its latest desired state, one model after the other."""

    def __init__(
        self, config: AgentConfig, store: ModelStore, broker: Broker, server: InferenceServer, report: Report
    ) -> None:
        self._config = config
        self._store = store
        self._broker = broker
        self._server = server
        self._report = report
        self._subjects = Subjects(config.tenant)
        self._latest: dict[str, Desired] = {}
        self._changed: asyncio.Queue[str] = asyncio.Queue()

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
        except (FedtideError, OSError) as exc:
            self._fall_back(desired, current)
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
        return load_release(self._config, self._store, release)

    def _fall_back(self, desired: Desired, current: Current | None) -> None:
        """Serve what was served before, and remember the counter that failed. Needs no network."""
        release = current.release if current is not None else None
        previous = current.previous if current is not None else None
        try:
            self._store.set_current(_current(desired, release, previous))
            if self._server.serving().get(desired.model) not in (None, release.digest if release else None):
                self._server.remove(desired.model)
                if release is not None:
                    self._server.swap(self._load(release))
        except (FedtideError, OSError) as exc:
            log.error("release.fall_back_failed", extra={"model": desired.model, "reason": str(exc)})


def load_release(config: AgentConfig, store: ModelStore, release: BlobRef) -> Model:
    """A release from disk, with its smoke inference passed.

    Raises:
        ModelUnusable, MalformedMessage: it is not whole, or does not do what it promises.
    """
    folder = store.folder(release)
    model = Model(release, store.manifest(release), folder, config.inference_threads)
    model.smoke_test(folder)
    return model


def serve_from_disk(config: AgentConfig, store: ModelStore, server: InferenceServer) -> None:
    """Serve what the disk says, before the network is there; fall back to the release before."""
    for current in store.current():
        for release in (current.release, current.previous):
            if release is None:
                continue
            try:
                server.swap(load_release(config, store, release))
                break
            except (FedtideError, OSError) as exc:
                log.error("release.unusable", extra={"release": release.digest, "reason": str(exc)})


def _current(desired: Desired, release: BlobRef | None, previous: BlobRef | None) -> Current:
    return Current(
        model=desired.model, counter=desired.counter, rollout=desired.rollout, release=release, previous=previous
    )
