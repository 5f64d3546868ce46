"""Has releases vouched for: by the release authority, or by people who sign what they are shown."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version

from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.models.registry import Release
from fedtide.coordinator.runs import provenance as story
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import Conflict, RemoteError
from fedtide.fabric.events.envelope import ModelProduced, ReleaseAttested
from fedtide.fabric.messages.attestation import AttestationGiven, AttestationWanted
from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.release import ReleaseManifest
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trust import provenance
from fedtide.fabric.trust.refusals import Untrusted

ANSWER_WITHIN_S = 20.0


class NotVouchedFor(RemoteError):
    """The release authority does not sign a release; it says why."""


class Attesting:
    """`by_people`: nobody is asked; a release waits until people have signed it."""

    def __init__(
        self, broker: Broker, subjects: Subjects, engine: Engine, director: Director, *, by_people: bool
    ) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._director = director
        self._distribution = Distribution(broker, subjects)
        self._by_people = by_people

    def statement(self, manifest: ReleaseManifest, raw: bytes) -> bytes:
        """What is to be signed of a release."""
        run = self._engine.world.runs.get(manifest.lineage.run)
        return provenance.statement(raw, story.predicate(manifest, run, datetime.now(UTC), version("fedtide")))

    async def of_run(self, produced: ModelProduced, manifest: ReleaseManifest, raw: bytes) -> BlobRef | None:
        """The attestation of what a run has made; None: people sign it, or nobody signs anything here.

        Raises:
            NotVouchedFor: the authority refuses.
            BrokerUnavailable: it does not answer.
        """
        if not self._director.is_used or self._by_people:
            return None
        trust = self._director.newer_than(TrustKnown()) or TrustMetadata()
        base, base_attestation = await self._base(manifest)
        wanted = AttestationWanted(
            manifest=raw,
            statement=self.statement(manifest, raw),
            produced=to_json(produced),
            base=base,
            base_attestation=base_attestation,
            trust=trust,
        )
        answer = await self._broker.ask(self._subjects.signing, to_json(wanted), timeout_s=ANSWER_WITHIN_S)
        given = from_json(AttestationGiven, answer, "attestation")
        if given.error:
            raise NotVouchedFor(f"the release authority does not sign {provenance.named(manifest)}: {given.error}")
        provenance.attested(self._director.chain, raw, given.envelope, datetime.now(UTC).timestamp())
        return await self._distribution.store(given.envelope.encode())

    async def _base(self, manifest: ReleaseManifest) -> tuple[bytes, str]:
        base = manifest.lineage.base
        if base is None:
            return b"", ""
        attestation = self._engine.world.attestation_of(base)
        signed = (await self._distribution.read(attestation)).decode() if attestation is not None else ""
        return await self._distribution.read(base), signed

    async def shown(self, release: Release) -> tuple[bytes, str]:
        """The manifest of a release as it is stored, and its envelope: with its signatures, or to be signed."""
        raw = await self._distribution.read(release.ref)
        if release.attestation is not None:
            return raw, (await self._distribution.read(release.attestation)).decode()
        return raw, provenance.sealed(self.statement(release.manifest, raw), [])

    async def take(self, release: Release, envelope: str) -> None:
        """Keep what people have signed of a release.

        Raises:
            Conflict: those who must sign it have not.
        """
        raw = await self._distribution.read(release.ref)
        try:
            provenance.attested(self._director.chain, raw, envelope, datetime.now(UTC).timestamp())
        except Untrusted as exc:
            raise Conflict(exc.what, "`fedtide trust show` says whose keys may sign it, and how many") from exc
        ref = await self._distribution.store(envelope.encode())
        model = release.manifest.model
        await self._engine.submit(ReleaseAttested(model=model, release=release.ref, attestation=ref))
