"""NATS JWTs and nkeys: made, signed and read as nats-server wants them.

Format: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt (claims of version 2,
algorithm `ed25519-nkey`). The only library for it calls itself untested (docs/decisions/0016-identities.md).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nkeys
from nacl.exceptions import CryptoError
from nacl.signing import VerifyKey

from fedtide.fabric.errors import MalformedMessage

OPERATOR = nkeys.PREFIX_BYTE_OPERATOR
ACCOUNT = nkeys.PREFIX_BYTE_ACCOUNT
USER = nkeys.PREFIX_BYTE_USER


@dataclass(frozen=True, slots=True)
class Key:
    """An nkey: `public` names its holder, `seed` proves it (secret)."""

    public: str
    seed: str

    @classmethod
    def new(cls, prefix: int) -> Key:
        return cls.from_bytes(os.urandom(32), prefix)

    @classmethod
    def from_bytes(cls, raw: bytes, prefix: int) -> Key:
        """The key whose private part is these 32 bytes."""
        return cls.of(bytes(nkeys.encode_seed(raw, prefix)).decode())

    @classmethod
    def of(cls, seed: str) -> Key:
        """Raises MalformedMessage if it is no seed."""
        try:
            return cls(_pair(seed).public_key.decode(), seed)
        except (nkeys.NkeysError, ValueError) as exc:
            raise MalformedMessage("that is not an nkey seed") from exc

    def sign(self, data: bytes) -> bytes:
        signature: bytes = _pair(self.seed).sign(data)
        return signature

    def __repr__(self) -> str:
        return f"Key({self.public})"  # never the seed: this may come into a log


def public_key(raw: bytes, prefix: int) -> str:
    """32 bytes as a public nkey: kind, bytes and checksum in base32."""
    body = bytearray([prefix, *raw])
    return base64.b32encode(bytes(body) + nkeys.crc16(body).to_bytes(2, "little")).rstrip(b"=").decode()


def is_user_key(public: str) -> bool:
    """Whether `public` can be the public nkey of a user."""
    try:
        raw = base64.b32decode(public + "=" * (-len(public) % 8))
    except ValueError:
        return False
    right_kind = len(raw) == 35 and raw[0] == USER
    return right_kind and int.from_bytes(raw[33:], "little") == nkeys.crc16(bytearray(raw[:33]))


def sign(
    kind: str,
    subject: str,
    name: str,
    about: Mapping[str, object],
    by: Key,
    *,
    expires: float | None = None,
    issued: float | None = None,
) -> str:
    """A JWT; the same arguments give the same bytes.

    Args:
        kind: `operator`, `account` or `user`.
        subject: the public nkey that it is about.
        about: the `nats` part of the claims.
        expires: seconds since the epoch, or None: never.
        issued: the same, or None: now.
    """
    claims: dict[str, object] = {
        "iss": by.public,
        "sub": subject,
        "name": name,
        "iat": int(time.time() if issued is None else issued),
        "nats": {"type": kind, "version": 2, **about},
    }
    if expires is not None:
        claims["exp"] = int(expires)
    fingerprint = hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).digest()
    claims["jti"] = base64.b32encode(fingerprint).rstrip(b"=").decode()
    head = {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = ".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
    return f"{signed}.{_base64(by.sign(signed.encode()))}"


def read(jwt: str) -> dict[str, Any]:
    """The claims of a JWT, without any check of who signed it.

    Raises:
        MalformedMessage: it is no JWT.
    """
    try:
        body = jwt.split(".")[1]
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, IndexError) as exc:
        raise MalformedMessage("that is not a JWT") from exc
    return claims


def signed_by(jwt: str, public: str) -> dict[str, Any]:
    """The claims of a JWT that the holder of a public nkey has signed.

    Raises:
        MalformedMessage: it is none, or somebody else's.
    """
    claims, (text, _, signature) = read(jwt), jwt.rpartition(".")
    try:
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    except ValueError as exc:
        raise MalformedMessage("that is not a JWT") from exc
    if claims.get("iss") != public or not is_signed(public, text.encode(), base64.b64encode(raw).decode()):
        raise MalformedMessage("that JWT is signed by somebody else")
    return claims


def _pair(seed: str) -> nkeys.KeyPair:
    return nkeys.from_seed(bytearray(seed.encode()))


def is_signed(public: str, text: bytes, signature: str) -> bool:
    """Whether the holder of a public nkey has signed `text`; `signature` is base64."""
    try:
        raw = base64.b32decode(public + "=" * (-len(public) % 8))[1:33]
        VerifyKey(raw).verify(text, base64.b64decode(signature, validate=True))
    except (ValueError, TypeError, CryptoError):
        return False
    return True


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
