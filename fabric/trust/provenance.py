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
    about = decode_release(manifest)
    subject = {"name": f"{about.model}@{about.version}", "digest": {"sha256": hashlib.sha256(manifest).hexdigest()}}
    body = {"_type": STATEMENT, "subject": [subject], "predicateType": PREDICATE, "predicate": predicate}
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


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
    """Raises Untrusted: the statement is about something else."""
    digests = [one.get("digest", {}).get("sha256") for one in said["subject"] if isinstance(one, dict)]
    if hashlib.sha256(manifest).hexdigest() not in digests:
        raise Untrusted("wrong_target", "the attestation is about another release")


def named(manifest: ReleaseManifest) -> str:
    return f"{manifest.model}@{manifest.version}"
