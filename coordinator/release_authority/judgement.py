"""Whether a release may be vouched for: whose app, whose run, from what. Pure."""

from __future__ import annotations

from typing import Any

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.events.envelope import ModelProduced
from fedtide.fabric.messages.attestation import AttestationWanted
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.tensors.blobs import chunked, manifest_of
from fedtide.fabric.trust import provenance
from fedtide.fabric.trust.chain import Chain
from fedtide.fabric.trust.claims import produced_claim, publishers_of
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import MessageCheck, is_signed

USUAL_TOLERANCE: float = ReleaseManifest.model_fields["smoke_tolerance"].default


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
    _check_counted(said, manifest)
    publishers_of(chain, manifest.lineage.app, now)
    mandate = MessageCheck().mandate(chain, produced.mandate, now)
    if (mandate.run, mandate.app) != (manifest.lineage.run, manifest.lineage.app.bundle.digest):
        raise Untrusted("wrong_target", f"the mandate is for run {mandate.run}, and another app or run has made this")
    if not is_signed(mandate.key, produced_claim(produced), produced.signature):
        raise Untrusted("arbitrary", f"the aggregator of run {mandate.run} has not signed this model")
    if _made(produced) != _made_in(manifest):
        raise Untrusted("wrong_target", "the release holds another model than the run has made, or says more of it")
    if manifest.lineage.base is not None:
        _check_base(chain, wanted, manifest, now)
    return manifest


def _check_counted(said: dict[str, Any], manifest: ReleaseManifest) -> None:
    """The statement says of the release what its manifest says, which the run's aggregator has signed in part."""
    lineage = manifest.lineage
    privacy = lineage.privacy.model_dump(mode="json") if lineage.privacy is not None else None
    counted = {"rounds": lineage.rounds, "updates": lineage.updates, "participants": lineage.participants}
    found = said["predicate"].get("buildDefinition", {}).get("internalParameters", {})
    if any(found.get(name) != value for name, value in {**counted, "privacy": privacy}.items()):
        raise Untrusted("wrong_target", "the statement counts otherwise than the release")


def _made(produced: ModelProduced) -> dict[str, Any]:
    return {**_about(produced), "run": produced.run, "base": produced.base, "tolerance": USUAL_TOLERANCE}


def _made_in(manifest: ReleaseManifest) -> dict[str, Any]:
    lineage = manifest.lineage
    own = {"run": lineage.run, "base": lineage.base, "tolerance": manifest.smoke_tolerance}
    return {**_about(manifest), **own, "privacy": to_json(lineage.privacy) if lineage.privacy is not None else b""}


def _about(each: ModelProduced | ReleaseManifest) -> dict[str, Any]:
    """As JSON: a number that is none is not even itself."""
    privacy = each.privacy if isinstance(each, ModelProduced) else None
    return {
        **{name: getattr(each, name) for name in ("model", "onnx", "parts", "arrays", "smoke")},
        "export": to_json(each.export),
        "metrics": {name: repr(value) for name, value in each.metrics.items()},
        "privacy": to_json(privacy) if privacy is not None else b"",
    }


def _check_base(chain: Chain, wanted: AttestationWanted, manifest: ReleaseManifest, now: float) -> None:
    if manifest_of(list(chunked([wanted.base]))).ref != manifest.lineage.base:
        raise Untrusted("wrong_target", "that is not the release that the run started from")
    provenance.attested(chain, wanted.base, wanted.base_attestation, now)
