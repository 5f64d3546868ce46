"""Releases on their way to nodes: into the cache of a region, and as the desired state of a node.

A region's leaf gets every blob once, at the pace the plan allows, and keeps what its nodes serve or
may fall back to. The bytes that crossed the link are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.commands import CacheRelease, SetDesired
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.state import World
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import DigestMismatch, MalformedMessage, NotFound
from fedtide.fabric.events.rollouts import RegionCached, RegionCacheFailed
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.compare_and_set import replace_stored
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.rate_limit import Pace
from fedtide.fabric.nats.subjects import CACHE, ORDERS, RELEASES, Subjects
from fedtide.fabric.nats.transfer import Source, put_blob, read_blob, stream_blob
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.plans.rollout_plan import Desired
from fedtide.fabric.tensors.blobs import MANIFEST_CHUNK, BlobRef
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import signatures_in

log = logging.getLogger(__name__)

KEPT_RELEASES = 2
"""How many of the newest releases of each model a region keeps, even if no node serves them."""


class Distribution:
    """Carries out what roll-outs ask for. Each command may run twice."""

    def __init__(self, broker: Broker, subjects: Subjects, director: Director | None = None) -> None:
        """`director`: signs desired states."""
        self._broker = broker
        self._subjects = subjects
        self._director = director

    async def keep(self, run: str, manifest: ReleaseManifest) -> None:
        """Keep the blobs that a run has made for a release, under names that only the coordinator may write.

        Raises:
            NotFound, DigestMismatch: the run did not store what it reported.
        """
        source = Source(self._broker, RELEASES)

        def upload(digest: str) -> str:
            return self._subjects.release_upload(run, digest)

        for ref in dict.fromkeys([*manifest.served, manifest.arrays]):
            base = self._subjects.release_blob(ref.digest)
            if await self._broker.last(RELEASES, f"{base}.{MANIFEST_CHUNK}") is not None:
                continue
            chunk_list = await source.manifest(upload(ref.digest), ref)
            number = 0
            async for chunk in stream_blob(source, upload, ref):
                await self._broker.publish(f"{base}.{number}", chunk, timeout_s=60)
                number += 1
            await self._broker.publish(f"{base}.{MANIFEST_CHUNK}", chunk_list.encode())
        await self._broker.purge(RELEASES, self._subjects.release_uploads(run))

    async def store(self, content: bytes) -> BlobRef:
        """Keep a release's manifest, or its attestation."""
        return await put_blob(self._broker, self._subjects.release_blob, RELEASES, [content], ttl_s=None)

    async def read(self, ref: BlobRef) -> bytes:
        """Raises NotFound: it is not there (any more)."""
        return bytes(await read_blob(Source(self._broker, RELEASES), self._subjects.release_blob, ref))

    async def onnx(self, manifest: ReleaseManifest) -> bytes:
        """The ONNX file of a release, whole."""
        source = Source(self._broker, RELEASES)
        return b"".join([await read_blob(source, self._subjects.release_blob, p) for p in manifest.onnx_parts])

    async def missing_bytes(self, region: str, release: BlobRef) -> int:
        """What a roll-out would send over a region's link."""
        return sum([ref.size_bytes for ref in await self._blobs(release) if not await self._has(region, ref)])

    async def cache(self, command: CacheRelease, engine: Engine) -> None:
        """Bring every blob of a release to a region; ends in `RegionCached`, or `RegionCacheFailed`.

        Raises:
            BrokerUnavailable: hub or leaf went away; call again to go on where it stopped.
        """
        rollout, region = command.rollout, command.region
        if not rollouts.wants_cache(engine.world.rollout(rollout), region):
            return
        try:
            attestation = engine.world.attestation_of(command.release)
            sent = await self._fill(region, command.release, attestation, Pace(command.bytes_per_s))
        except (DigestMismatch, MalformedMessage, NotFound) as exc:
            await engine.submit(RegionCacheFailed(rollout=rollout, region=region, reason=str(exc)))
            return
        cached = RegionCached(rollout=rollout, region=region, wan_bytes=sent)
        await engine.submit(cached, id=f"{rollout}.{region}.{command.counter}.cached")
        await self._sweep(region, engine.world)

    async def _fill(self, region: str, release: BlobRef, attestation: BlobRef | None, pace: Pace) -> int:
        """Copy the blobs that the region lacks; returns how many bytes were sent."""
        sent = 0
        for ref in [*await self._blobs(release), *([attestation] if attestation is not None else [])]:
            if not await self._has(region, ref):
                await self._copy(region, ref, pace)
                sent += ref.size_bytes
        return sent

    async def set_desired(self, command: SetDesired, world: World) -> None:
        node = world.node(command.node)
        expires_at = None if command.expires_at is None else command.expires_at.timestamp()
        desired = Desired(
            model=command.model,
            counter=command.counter,
            rollout=command.rollout,
            release=command.release,
            expires_at=expires_at,
            terms=command.terms,
            generation=world.epoch.generation,
            attestation=world.attestation_of(command.release) if command.release is not None else None,
        )
        subject, data = self._subjects.desired(node.region, node.name, command.model), to_json(desired)
        signed = self._director.headers(subject, data) if self._director is not None else {}
        await replace_stored(
            self._broker, ORDERS, subject, data, lambda stored: _replaces(desired, stored, subject), signed
        )

    async def sign_again(self, subject: str) -> None:
        """Sign a stored desired state with the keys that count now, if it was with others."""
        if self._director is None or not self._director.is_used:
            return
        stored = await self._broker.last(ORDERS, subject)
        if stored is None or self._is_signed(stored):
            return
        signed = self._director.headers(subject, stored.data)
        await replace_stored(self._broker, ORDERS, subject, stored.data, lambda now: now == stored.data, headers=signed)

    def _is_signed(self, stored: Received) -> bool:
        assert self._director is not None
        try:
            by = signatures_in(stored.headers)
        except Untrusted:
            return False
        return not set(self._director.key_ids.split(",")).isdisjoint(by)

    async def _blobs(self, release: BlobRef) -> list[BlobRef]:
        raw = await read_blob(Source(self._broker, RELEASES), self._subjects.release_blob, release)
        return [*decode_release(bytes(raw)).served, release]

    async def _has(self, region: str, ref: BlobRef) -> bool:
        # The chunk list is stored last: if it is there, the blob is complete.
        subject = f"{self._subjects.cache_blob(region, ref.digest)}.{MANIFEST_CHUNK}"
        return await self._broker.last(CACHE, subject, domain=region) is not None

    async def _copy(self, region: str, ref: BlobRef, pace: Pace) -> None:
        there, here = self._subjects.cache_blob(region, ref.digest), self._subjects.release_blob
        present = await self._broker.subjects_of(CACHE, f"{there}.>", domain=region)
        source = Source(self._broker, RELEASES)
        manifest = await source.manifest(here(ref.digest), ref)
        missing = [i for i in range(len(manifest.chunks)) if f"{there}.{i}" not in present]
        chunks = stream_blob(source, here, ref, chunks=missing)
        for index in missing:
            chunk = await anext(chunks)
            await pace.spend(len(chunk))
            await self._broker.publish(f"{there}.{index}", chunk, timeout_s=60)
        await self._broker.publish(f"{there}.{MANIFEST_CHUNK}", manifest.encode())

    async def _sweep(self, region: str, world: World) -> None:
        """Delete what no node of the region serves, may go back to, or is about to be offered."""
        kept = kept_blobs(region, world)
        if kept is None:
            return
        prefix = self._subjects.cache_blob(region, "")
        stored = await self._broker.subjects_of(CACHE, f"{prefix}>", domain=region)
        for digest in sorted({subject.removeprefix(prefix).partition(".")[0] for subject in stored} - kept):
            purged = await self._broker.purge(CACHE, f"{self._subjects.cache_blob(region, digest)}.>", domain=region)
            log.info("cache.swept", extra={"region": region, "blob": digest[:12], "chunks": purged})


def _replaces(desired: Desired, stored: bytes, subject: str) -> bool:
    """Whether a desired state goes over what is stored; over what does not decode in any case."""
    try:
        found = from_json(Desired, stored, subject)
    except MalformedMessage as exc:
        log.warning("desired.unreadable", extra={"subject": subject, "reason": str(exc)})
        return True
    if found.order == desired.order and found.expires_at is None and desired.expires_at is not None:
        return False  # an offer that comes late: the node keeps the release already
    return found != desired and found.order <= desired.order


def kept_blobs(region: str, world: World) -> frozenset[str] | None:
    """Digests of what a region must keep; None if the registry does not know all of what is in use."""
    releases = [r for m in world.models.values() for r in m.releases]
    manifests = {r.ref: r.manifest for r in releases}
    used = set(_in_use(region, world))
    if not used <= manifests.keys():
        log.warning("cache.not_swept", extra={"region": region, "reason": "a release in use is in no model"})
        return None
    attestations = {r.ref: [r.attestation] if r.attestation is not None else [] for r in releases}
    return frozenset(ref.digest for each in used for ref in [*manifests[each].served, each, *attestations[each]])


def _in_use(region: str, world: World) -> Iterable[BlobRef]:
    for model in world.models.values():
        yield from (release.ref for release in model.releases[-KEPT_RELEASES:])
    for serving in world.serving.values():
        yield from (ref for node, ref in serving.items() if node in world.nodes and world.nodes[node].region == region)
    for rollout in world.rollouts.values():
        plan = rollout.facts.plan
        before = [*plan.previous.values(), *([plan.fallback] if plan.fallback is not None else [])]
        match rollout:
            case rollouts.Rolling() | rollouts.Paused() | rollouts.Completed(followed=False):
                yield from [plan.release, *before]
            case rollouts.RolledBack(followed=False):
                yield from before
            case _:
                pass  # a newer one has followed
