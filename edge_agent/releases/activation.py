"""From a desired state to a served release, phase by phase, reported as it goes.

`offered -> downloading -> verified -> staged -> smoke_tested -> active -> confirmed`. The old
release serves until the new one has passed its smoke inference; `confirmed` is reported only after
an inference through the model that is being served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.fleet_clock import FleetClock
from fedtide.edge_agent.identity.capabilities import machine_timezone
from fedtide.edge_agent.identity.node_trust import NodeTrust
from fedtide.edge_agent.owner_policy import Owner, OwnerRefuses
from fedtide.edge_agent.releases.download import ReleaseDownload
from fedtide.edge_agent.releases.model_store import Current, ModelStore
from fedtide.edge_agent.serving.footprint import shrink
from fedtide.edge_agent.serving.serving import Serving
from fedtide.edge_agent.serving.sessions import Model
from fedtide.fabric import trace_context
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.rollout_plan import Desired, NodePhase
from fedtide.fabric.plans.windows import opens_at
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trace_context import TraceContext, within
from fedtide.fabric.trust.provenance import MOST_BYTES

log = logging.getLogger(__name__)

Report = Callable[[Desired, NodePhase, str, int], Awaitable[None]]
"""Arguments: desired state, phase, reason, bytes fetched over the WAN."""
Compare = Callable[[Desired, Model, Model | None], None]
"""Arguments: desired state, candidate, incumbent. Starts their comparison."""


class _Superseded(FedtideError):
    """A newer desired state arrived."""


class Activation:
    """Brings each model to its latest desired state; models are independent of each other."""

    def __init__(
        self,
        config: AgentConfig,
        store: ModelStore,
        broker: Broker,
        serving: Serving,
        report: Report,
        compare: Compare,
        settled: Callable[[str], None],
        clock: FleetClock,
        trust: NodeTrust,
    ) -> None:
        self._clock = clock
        self._trust = trust
        self.swapped: Callable[[], None] = lambda: None
        """Called when a model is served by another release, or again."""
        self._config = config
        self._store = store
        self._broker = broker
        self._serving = serving
        self._report = report
        self._compare = compare
        self._settled = settled
        self._subjects = Subjects(config.tenant)
        self._latest: dict[str, Desired] = {}
        self._traces: dict[str, TraceContext | None] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._models: asyncio.Queue[str] = asyncio.Queue()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), UTC)

    async def want(self, desired: Desired) -> None:
        """Accept a desired state. A model's highest counter wins; for equal counters, the newest message."""
        known = self._latest.get(desired.model)
        if known is not None and (desired.order < known.order or desired == known):
            if desired.order < known.order:
                await self._trust.refused("desired", "rollback", desired.model, f"{desired.order} after {known.order}")
            return
        if desired.expires_at is not None and self._clock.now() > desired.expires_at and not self._has_seen(desired):
            log.info("release.offer_expired", extra={"rollout": desired.rollout, "counter": desired.counter})
            await self._report(desired, "timed_out", "its offer had expired when it came", 0)
            return
        if known is not None and desired.order == known.order:
            self._latest[desired.model] = desired
            if desired.expires_at is None:
                self._settled(desired.model)
            return
        self._latest[desired.model] = desired
        self._traces[desired.model] = trace_context.current()
        if desired.model in self._news:
            self._news[desired.model].set()
        else:
            self._news[desired.model] = asyncio.Event()
            self._news[desired.model].set()
            self._models.put_nowait(desired.model)

    def _has_seen(self, desired: Desired) -> bool:
        """Whether work on it began before it expired: a restart in between must not cancel it."""
        current = self._store.current_of(desired.model)
        begun = desired.release is not None and self._store.has_begun(desired.release)
        return begun or (current is not None and current.order >= desired.order)

    async def run(self) -> None:
        """Work towards the desired state for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                model = await self._models.get()
                group.create_task(self._follow(model), name=f"activate-{model}")

    async def _follow(self, model: str) -> None:
        while True:
            await self._news[model].wait()
            self._news[model].clear()
            with within(self._traces[model]):
                await self._apply(self._latest[model])

    async def _apply(self, desired: Desired) -> None:
        current = self._store.current_of(desired.model)
        if current is not None and desired.order < current.order:
            reason = f"counter {desired.counter} is lower than {current.counter}, which this node has seen"
            await self._trust.refused("desired", "rollback", desired.model, reason)
            await self._report(desired, "rejected", reason, 0)
            return
        try:
            if current is not None and desired.order == current.order:
                await self._again(desired, current)
            else:
                await self._activate(desired, current)
        except _Superseded:
            await self._report(desired, "superseded", "a newer desired state arrived", 0)
        except Exception as exc:  # no error of a release may stop the serving
            if isinstance(exc, OwnerRefuses):
                await self._trust.refused("release", "owner", desired.model, exc.what)
            if not isinstance(exc, FedtideError | OSError):
                log.exception("release.failed")
            self._fall_back(desired, current)
            await self._report(desired, "failed", str(exc), 0)

    async def _again(self, desired: Desired, current: Current) -> None:
        """Report, after a restart, the outcome of a desired state that was handled before it."""
        wanted = desired.release.digest if desired.release is not None else None
        if self._serving.serving().get(desired.model) != wanted:
            if desired.release is None or desired.release != current.release:
                await self._report(desired, "failed", "failed before a restart", 0)
                return
            await self._repair(desired, current)
        await self._report(desired, "confirmed", "", 0)
        active = self._serving.active(desired.model)
        if active is not None and desired.terms.measure:
            self._compare(desired, active, await asyncio.to_thread(self._incumbent, current.previous))

    async def _repair(self, desired: Desired, current: Current) -> None:
        """Fetch again what this node should serve and could not load; what it serves meanwhile goes on.

        Raises:
            FedtideError, OSError: as the activation of a release.
        """
        assert desired.release is not None
        await self._report(desired, "downloading", "the release was damaged on the node's disk", 0)
        download = ReleaseDownload(self._broker, self._subjects, self._config.region, desired.terms.bytes_per_s)
        self._store.discard(desired.release)
        staging = await self._fetch(desired, desired.release, download)
        await asyncio.to_thread(self._store.stage, desired.release, staging)
        self._serving.swap(await asyncio.to_thread(load_release, self._config, self._store, desired.release))
        log.warning("release.repaired", extra={"release": desired.release.digest, "model": desired.model})
        self.swapped()

    def _incumbent(self, release: BlobRef | None) -> Model | None:
        try:
            return load_release(self._config, self._store, release) if release is not None else None
        except (FedtideError, OSError) as exc:
            log.warning("release.incumbent_unusable", extra={"reason": str(exc)})
            return None

    async def _activate(self, desired: Desired, current: Current | None) -> None:
        served = self._serving.active(desired.model)
        if desired.release is None:
            self._serving.remove(desired.model)
            self._store.set_current(_current(desired, None, _good(current, None)))
            await self._report(desired, "confirmed", "nothing is served any more", 0)
            return
        Owner(self._config.policy_file).policy().check_model(desired.model)
        await self._enter(desired, "downloading")
        terms = desired.terms
        download = ReleaseDownload(self._broker, self._subjects, self._config.region, terms.bytes_per_s)
        staging = await self._fetch(desired, desired.release, download)
        await self._enter(desired, "verified", download.wan_bytes)
        await asyncio.to_thread(self._store.stage, desired.release, staging)
        await self._enter(desired, "staged")
        model = await asyncio.to_thread(load_release, self._config, self._store, desired.release)
        if served is not None and not terms.new_interface:
            model.check_interface(served)
        await self._enter(desired, "smoke_tested")
        await self._until_window(desired)
        self._store.set_current(_current(desired, desired.release, _good(current, desired.release)))
        self._serving.swap(model)
        self.swapped()
        await self._report(desired, "active", "", 0)
        await asyncio.to_thread(model.smoke_test, self._store.folder(desired.release))
        await self._report(desired, "confirmed", "", 0)
        if terms.measure:
            comparable = served is not None and model.interface == served.interface
            self._compare(desired, model, served if comparable else None)
        else:
            self._settled(desired.model)
        await asyncio.to_thread(self._store.sweep, self._wanted())
        shrink()

    def _wanted(self) -> list[BlobRef]:
        return [d.release for d in self._latest.values() if d.release is not None]

    async def _enter(self, desired: Desired, phase: NodePhase, wan_bytes: int = 0) -> None:
        self._check_latest(desired)
        await self._report(desired, phase, "", wan_bytes)

    def _check_latest(self, desired: Desired) -> None:
        if self._latest[desired.model].order != desired.order:
            raise _Superseded("superseded")

    async def _until_window(self, desired: Desired) -> None:
        """Wait for the maintenance window; a newer desired state ends the wait."""
        window, zone = desired.terms.window, self._config.timezone or machine_timezone()
        while (
            window is not None
            and (opens := opens_at(window, now := datetime.fromtimestamp(self._clock.now(), UTC), zone)) > now
        ):
            log.info("release.waits_for_window", extra={"opens": opens.isoformat()})
            try:
                async with asyncio.timeout((opens - now).total_seconds()):
                    await self._news[desired.model].wait()
            except TimeoutError:
                continue
            self._check_latest(desired)
        self._check_latest(desired)

    async def _fetch(self, desired: Desired, release: BlobRef, download: ReleaseDownload) -> Path:
        """Raises Untrusted: nobody who may vouches for it."""

        async def vouched(manifest: bytes) -> bytes:
            ref = desired.attestation
            envelope = await download.small(ref) if ref is not None and ref.size_bytes <= MOST_BYTES else b""
            name = f"{desired.model} {release.digest[:12]}"
            roles = await self._trust.release(manifest, envelope.decode(errors="replace"), name)
            Owner(self._config.policy_file).policy().check_release(desired.model, roles)
            return envelope

        async def fetch() -> Path:
            self._check_latest(desired)
            return await self._store.fetch(download, desired.model, release, vouched)

        return await until_done(log, "release.waits", fetch, release=release.digest)

    def _fall_back(self, desired: Desired, current: Current | None) -> None:
        """Serve what was served before, and remember the counter that failed. Needs no network."""
        release = current.release if current is not None else None
        try:
            self._store.set_current(_current(desired, release, current.previous if current is not None else None))
            if desired.release is not None and desired.release not in (release, current and current.previous):
                self._store.discard(desired.release)
            if self._serving.serving().get(desired.model) not in (None, release.digest if release else None):
                if release is None:
                    self._serving.remove(desired.model)
                else:  # what cannot be loaded takes nothing out of service
                    self._serving.swap(load_release(self._config, self._store, release))
        except (FedtideError, OSError) as exc:
            log.error("release.fall_back_failed", extra={"model": desired.model, "reason": str(exc)})


def load_release(config: AgentConfig, store: ModelStore, release: BlobRef) -> Model:
    """A release from disk, with its smoke inference passed.

    Raises:
        ModelUnusable, MalformedMessage: it is incomplete, or fails its smoke inference.
    """
    folder = store.folder(release)
    model = Model(release, store.manifest(release), folder, config)
    model.smoke_test(folder)
    return model


def serve_from_disk(config: AgentConfig, store: ModelStore, serving: Serving) -> None:
    """Serve the releases on disk, without the network; fall back to the previous one. Damaged ones are deleted."""
    for current in store.current():
        for release in (current.release, current.previous):
            if release is None:
                continue
            try:
                Owner(config.policy_file).policy().check_model(current.model)
                store.check(release)
                serving.swap(load_release(config, store, release))
                break
            except (FedtideError, OSError) as exc:
                log.error("release.unusable", extra={"release": release.digest, "reason": str(exc)})


def _good(current: Current | None, coming: BlobRef | None) -> BlobRef | None:
    """The last-known-good release once `coming` is active: what is served now, unless the node goes back to it."""
    if current is None:
        return None
    if coming is None:
        return current.release or current.previous
    if coming == current.release:
        return current.previous
    return current.release if coming != current.previous else None


def _current(desired: Desired, release: BlobRef | None, previous: BlobRef | None) -> Current:
    return Current(
        model=desired.model,
        counter=desired.counter,
        rollout=desired.rollout,
        release=release,
        previous=previous,
        generation=desired.generation,
    )
