"""Signatures over messages: in two headers, so that the body is what it was.

What is signed is DSSE's pre-authentication encoding (https://github.com/secure-systems-lab/dsse, protocol.md) of the
body, with the subject in the payload type: bytes that were signed for one node are nothing for another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.strict import Message
from fedtide.fabric.trust.chain import Chain, Signatures
from fedtide.fabric.trust.libraries import CryptoSigner, Signer, dsse
from fedtide.fabric.trust.refusals import Untrusted

SIGNATURE, MANDATE, AT = "Fedtide-Signature", "Fedtide-Mandate", "Fedtide-Signed-At"
_MESSAGE = "application/vnd.fedtide.message.v1+json"
_MANDATE = "application/vnd.fedtide.mandate.v1+json"
MOST_SIGNATURES = 16


def pae(kind: str, body: bytes) -> bytes:
    return dsse.Envelope(body, kind, {}).pae()


def signed_bytes(subject: str, body: bytes, at: str = "") -> bytes:
    """What the signature of a message is over; `at`: the header of that name."""
    return pae(f"{_MESSAGE};subject={subject};at={at}", body)


class Mandate(Message):
    """The director lets the holder of a key give tasks and fold orders, for one run, until it ends.

    Args:
        app: the digest of the bundle that the run trains; it may order no other.
        key: an Ed25519 public key, hexadecimal.
        ends_at: seconds since the epoch.
    """

    run: str
    attempt: int = Field(ge=1)
    app: str
    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    ends_at: float = Field(allow_inf_nan=False)


def sign(signers: Iterable[Signer], payload: bytes) -> dict[str, str]:
    """The signatures of several keys, by their ids."""
    return {made.keyid: made.signature for made in (signer.sign(payload) for signer in signers)}


def header_of(signatures: Signatures) -> str:
    return ",".join(f"{keyid}={sig}" for keyid, sig in signatures.items())


def signatures_in(headers: Mapping[str, str]) -> dict[str, str]:
    """Raises Untrusted: the header is none."""
    text = headers.get(SIGNATURE, "")
    pairs = [part.partition("=")[::2] for part in text.split(",") if part]
    if len(pairs) > MOST_SIGNATURES or not all(keyid and sig for keyid, sig in pairs):
        raise Untrusted("arbitrary", "the signature does not parse")
    return dict(pairs)


def mandate_of(signers: Iterable[Signer], mandate: Mandate) -> str:
    """A mandate with the signatures of its giver: a DSSE envelope, as one line of JSON."""
    envelope = dsse.Envelope(to_json(mandate), _MANDATE, {})
    for signer in signers:
        envelope.sign(signer)
    return json.dumps(envelope.to_dict(), separators=(",", ":"))


class RunSigner:
    """Signs what an aggregator sends: with a key of this process, and the mandate that names it."""

    def __init__(self) -> None:
        self._signer = CryptoSigner.generate_ed25519()
        self.mandate = ""

    @property
    def key(self) -> str:
        """Public, as in a mandate."""
        return str(self._signer.public_key.keyval["public"])

    def headers(self, subject: str, body: bytes) -> dict[str, str]:
        """For a message; empty while nobody has given a mandate."""
        if not self.mandate:
            return {}
        made = sign([self._signer], signed_bytes(subject, body))
        return {SIGNATURE: header_of(made), MANDATE: self.mandate}

    def sign(self, payload: bytes) -> str:
        """A signature, hexadecimal."""
        return self._signer.sign(payload).signature


@dataclass(frozen=True, slots=True)
class Vouched:
    """Who vouches for a message: roles that are delegated, or the holder of their mandate."""

    roles: frozenset[str]
    mandate: Mandate | None = None


class MessageCheck:
    """Verifies messages; keeps the mandates that it has verified last."""

    MOST_KEPT = 64

    def __init__(self) -> None:
        self._mandates: dict[tuple[str, str, str], tuple[frozenset[str], Mandate]] = {}

    def check(
        self, chain: Chain, path: str, subject: str, body: bytes, headers: Mapping[str, str], now: float
    ) -> Vouched:
        """Raises Untrusted: whoever sent it may not."""
        given = signatures_in(headers)
        payload = signed_bytes(subject, body, headers.get(AT, ""))
        text = headers.get(MANDATE, "")
        if not text:
            return Vouched(chain.roles_for(path, payload, given, now))
        roles, mandate = self._mandate(chain, path, text, now)
        if mandate.ends_at <= now:
            raise Untrusted("expired", f"the mandate of run {mandate.run} is over")
        if not any(is_signed(mandate.key, payload, sig) for sig in given.values()):
            raise Untrusted("arbitrary", f"{path} is not signed by the holder of the mandate")
        return Vouched(roles, mandate)

    def mandate(self, chain: Chain, text: str, now: float) -> Mandate:
        """A mandate that some director has given, for whatever region, and that may be over. Raises Untrusted."""
        roles = chain.targets.delegations.roles if chain.targets is not None and chain.targets.delegations else None
        refusal = Untrusted("unknown_signer", "orders are delegated to nobody")
        for role in (roles or {}).values():
            for pattern in role.paths or ():
                if pattern.startswith("orders/"):
                    try:
                        return self._mandate(chain, pattern, text, now)[1]
                    except Untrusted as exc:
                        refusal = exc
        raise refusal

    def _mandate(self, chain: Chain, path: str, text: str, now: float) -> tuple[frozenset[str], Mandate]:
        key = chain.files.targets, path, text
        if key not in self._mandates:
            try:
                envelope = dsse.Envelope.from_dict(json.loads(text))
                mandate = from_json(Mandate, envelope.payload, "mandate")
            except Exception as exc:  # of JSON that the library does not foresee
                raise Untrusted("arbitrary", "the mandate does not parse") from exc
            if envelope.payload_type != _MANDATE:
                raise Untrusted("arbitrary", f"the mandate is of type {envelope.payload_type!r}")
            signatures = {keyid: each.signature for keyid, each in envelope.signatures.items()}
            roles = chain.roles_for(path, envelope.pae(), signatures, now)
            while len(self._mandates) >= self.MOST_KEPT:
                del self._mandates[next(iter(self._mandates))]
            self._mandates[key] = roles, mandate
        chain.check_current(now)
        return self._mandates[key]


def is_signed(key: str, payload: bytes, signature: str) -> bool:
    """Whether the holder of an Ed25519 key has signed that; both hexadecimal."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), payload)
    except (InvalidSignature, ValueError):
        return False
    return True
