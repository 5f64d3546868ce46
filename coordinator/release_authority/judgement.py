"""Whether a release may be vouched for: whose app, whose run, from what. Pure."""

from __future__ import annotations

from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.events.envelope import ModelProduced
from fedtide.fabric.messages.attestation import AttestationWanted
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.tensors.blobs import chunked, manifest_of
from fedtide.fabric.trust import provenance
from fedtide.fabric.trust.chain import Chain
from fedtide.fabric.trust.claims import produced_claim, publishers_of
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import MessageCheck, is_signed


def judge(chain: Chain, wanted: AttestationWanted, now: float) -> ReleaseManifest:
    """The manifest of a release that may be vouched for.

    Raises:
        Untrusted: a part of it is not what those say who may say it.
        MalformedMessage: it is no release.
    """
    manifest = decode_release(wanted.manifest)
    produced = from_json(ModelProduced, wanted.produced, "produced")
    said = provenance.said_in(wanted.statement)
    provenance.check_subject(said, wanted.manifest)
    _check_said(said, manifest)
    publishers_of(chain, manifest.lineage.app, now)
    mandate = MessageCheck().mandate(chain, produced.mandate, now)
    if (mandate.run, mandate.app) != (manifest.lineage.run, manifest.lineage.app.bundle.digest):
        raise Untrusted("wrong_target", f"the mandate is for run {mandate.run}, and another app or run has made this")
    if not is_signed(mandate.key, produced_claim(produced), produced.signature):
        raise Untrusted("arbitrary", f"the aggregator of run {mandate.run} has not signed this model")
    if _made(produced) != _made_in(manifest):
        raise Untrusted("wrong_target", "the release holds another model than the run has made")
    if manifest.lineage.base is not None:
        _check_base(chain, wanted, manifest, now)
    return manifest


def _check_said(said: dict[str, object], manifest: ReleaseManifest) -> None:
    try:
        about = said["predicate"]["buildDefinition"]["externalParameters"]  # type: ignore[index]
        told = about["model"], about["version"], about["app"]["blob"]
    except (KeyError, TypeError) as exc:
        raise MalformedMessage("the statement does not say of which model it is, and of which app") from exc
    if told != (manifest.model, manifest.version, manifest.lineage.app.bundle.digest):
        raise Untrusted("wrong_target", "the statement says something else than the release")


def _made(produced: ModelProduced) -> tuple[object, ...]:
    return (
        produced.run,
        produced.model,
        produced.onnx,
        tuple(produced.parts),
        produced.arrays,
        produced.smoke,
        produced.base,
    )


def _made_in(manifest: ReleaseManifest) -> tuple[object, ...]:
    parts, lineage = tuple(manifest.parts), manifest.lineage
    return lineage.run, manifest.model, manifest.onnx, parts, manifest.arrays, manifest.smoke, lineage.base


def _check_base(chain: Chain, wanted: AttestationWanted, manifest: ReleaseManifest, now: float) -> None:
    if manifest_of(list(chunked([wanted.base]))).ref != manifest.lineage.base:
        raise Untrusted("wrong_target", "that is not the release that the run started from")
    provenance.attested(chain, wanted.base, wanted.base_attestation, now)
