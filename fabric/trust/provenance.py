"""Who vouches for a release, and how it came to be: an in-toto statement in a DSSE envelope.

Statement: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md; its predicate has the shape of SLSA
provenance v1 (https://slsa.dev/spec/v1.0/provenance). The subject is the release's manifest, byte by byte; the manifest
names every blob of the release.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.trust.chain import Chain, release_path
from fedtide.fabric.trust.libraries import Signer, dsse
from fedtide.fabric.trust.refusals import Untrusted

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
PAYLOAD = "application/vnd.in-toto+json"
BUILD_TYPE = "urn:fedtide:federated-run:v1"
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Attested:
    """What was signed of a release, and the roles that vouch for it."""

    statement: dict[str, Any]
    roles: frozenset[str]


def statement(manifest: bytes, predicate: dict[str, Any]) -> bytes:
    """The statement about a release, to be signed."""
    subject = _subject(decode_release(manifest), manifest)
    body = {"_type": STATEMENT, "subject": [subject], "predicateType": PREDICATE, "predicate": predicate}
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _subject(about: ReleaseManifest, manifest: bytes) -> dict[str, Any]:
    return {"name": named(about), "digest": {"sha256": hashlib.sha256(manifest).hexdigest()}}


def external(manifest: ReleaseManifest) -> dict[str, Any]:
    """What the predicate of every release says of it (SLSA's `externalParameters`)."""
    app = manifest.lineage.app
    return {
        "model": manifest.model,
        "version": manifest.version,
        "app": {"name": app.name, "blob": app.bundle.digest},
    }


def sealed(payload: bytes, signers: Iterable[Signer], before: str = "") -> str:
    """The envelope of a statement with these signatures, beside those that it has."""
    envelope = opened(before) if before else dsse.Envelope(payload, PAYLOAD, {})
    for signer in signers:
        envelope.sign(signer)
    return json.dumps(envelope.to_dict(), separators=(",", ":"))


def opened(text: str) -> dsse.Envelope:
    """Raises Untrusted: it is no envelope of a statement."""
    try:
        envelope = dsse.Envelope.from_dict(json.loads(text))
    except Exception as exc:  # of JSON that the library does not foresee
        raise Untrusted("arbitrary", "the attestation does not parse") from exc
    if envelope.payload_type != PAYLOAD:
        raise Untrusted("arbitrary", f"the attestation is of type {envelope.payload_type!r}")
    return envelope


def attested(chain: Chain, manifest: bytes, envelope: str, now: float) -> Attested:
    """What is said of a release, if whoever may say so has signed it.

    Args:
        manifest: of the release, as it is stored.

    Raises:
        Untrusted: nobody who may vouches for it, or for another release.
        MalformedMessage: the manifest is none.
    """
    found, about = opened(envelope), decode_release(manifest)
    given = {keyid: each.signature for keyid, each in found.signatures.items()}
    roles = chain.roles_for(release_path(about.model, about.version), found.pae(), given, now)
    said = said_in(found.payload)
    check_subject(said, manifest)
    return Attested(said, roles)


def said_in(payload: bytes) -> dict[str, Any]:
    """The statement of a payload. Raises Untrusted: it is none."""
    try:
        said = json.loads(payload)
        kinds = said["_type"], said["predicateType"], type(said["subject"]), type(said["predicate"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise Untrusted("arbitrary", "the attestation holds no statement") from exc
    if kinds != (STATEMENT, PREDICATE, list, dict):
        raise Untrusted("arbitrary", "the attestation holds another statement than provenance")
    assert isinstance(said, dict)
    return said


def check_subject(said: dict[str, Any], manifest: bytes) -> None:
    """Raises Untrusted: the statement is about something else, or about something else too."""
    about = decode_release(manifest)
    if said["subject"] != [_subject(about, manifest)]:  # one, and nothing else: it would be vouched for too
        raise Untrusted("wrong_target", "the attestation is about another release")
    try:
        external = said["predicate"]["buildDefinition"]["externalParameters"]
        told = external["model"], external["version"], external["app"]["blob"]
    except (KeyError, TypeError) as exc:
        raise Untrusted("arbitrary", "the attestation does not say of which model it is, and of which app") from exc
    if told != (about.model, about.version, about.lineage.app.bundle.digest):
        raise Untrusted("wrong_target", "the attestation says something else than the release")


def named(manifest: ReleaseManifest) -> str:
    return f"{manifest.model}@{manifest.version}"
