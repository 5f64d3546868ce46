"""Keys that sign: files (PEM, PKCS #8, perhaps with a passphrase), or a token through PKCS #11."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedtide.fabric.errors import CapabilityMissing, ConfigError
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.trust.libraries import CryptoSigner, Key, Signature, Signer, SSlibKey

PASSPHRASE = "FEDTIDE_KEY_PASSPHRASE"  # noqa: S105  # the name of a variable
"""Environment variable: of the keys' files."""
PKCS11 = "hsm:"
"""Begins the name of a key on a token (securesystemslib's URI); PYKCS11LIB names the token's library."""


def new() -> CryptoSigner:
    """A new Ed25519 key."""
    return CryptoSigner.generate_ed25519()


def save(signer: CryptoSigner, file: Path, passphrase: str = "") -> None:
    """Write a private key; only its owner can read it."""
    how = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    key: Any = load_pem_private_key(signer.private_bytes, None)  # the library's own writing knows no passphrase
    write_secret(file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how).decode())


def load(name: str | Path) -> Signer:
    """The signer of a file, or of a token (`hsm:KEYID?label=LABEL`).

    Raises:
        ConfigError: it cannot be read, or needs another passphrase.
        CapabilityMissing: a token is named, and the library for it is not installed.
    """
    text = str(name)
    if text.startswith(PKCS11):
        return _on_token(text)
    try:
        pem = Path(text).read_bytes()
    except OSError as exc:
        raise ConfigError(text, f"cannot be read: {exc.strerror}") from exc
    return parsed(pem, text)


def parsed(pem: bytes, path: str) -> CryptoSigner:
    """The signer of a private key (PEM). Raises ConfigError."""
    passphrase = os.environ.get(PASSPHRASE, "").encode() or None
    try:
        key: Any = load_pem_private_key(pem, passphrase if b"ENCRYPTED" in pem else None)
        return CryptoSigner(key)
    except (ValueError, TypeError) as exc:
        raise ConfigError(path, "is no private key, or its passphrase is another", f"Set {PASSPHRASE}") from exc


def public_pem(file: Path) -> str:
    """The public key of a private key's file, as PEM. Raises ConfigError."""
    try:
        key: Any = load_pem_private_key(parsed(file.read_bytes(), str(file)).private_bytes, None)
    except OSError as exc:
        raise ConfigError(str(file), f"cannot be read: {exc.strerror}") from exc
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def public_of(file: Path) -> SSlibKey:
    """The public key of a file, which may hold the private one. Raises ConfigError."""
    try:
        pem = file.read_bytes()
    except OSError as exc:
        raise ConfigError(str(file), f"cannot be read: {exc.strerror}") from exc
    if b"PRIVATE KEY" in pem:
        found = parsed(pem, str(file)).public_key
        assert isinstance(found, SSlibKey)
        return found
    try:
        key: Any = load_pem_public_key(pem)
        return SSlibKey.from_crypto(key)
    except ValueError as exc:
        raise ConfigError(str(file), "is no public key (PEM)", "openssl pkey -in KEY -pubout") from exc


def _on_token(uri: str) -> Signer:
    try:
        from securesystemslib.signer import HSMSigner
    except ImportError as exc:
        raise CapabilityMissing("keys on tokens need a library", "pip install 'fedtide[pkcs11]'") from exc
    try:
        parts = urlsplit(uri)
        number, label = int(parts.path or HSMSigner.SCHEME_KEYID), dict(parse_qsl(parts.query)).get("label")
        pin = lambda _: os.environ.get(PASSPHRASE, "")  # noqa: E731
        _, public = HSMSigner.import_(number, label, pin)
        return _OnToken(uri, HSMSigner.from_priv_key_uri(uri, public, pin))
    except Exception as exc:  # as a token fails: see _does_not_work
        raise _does_not_work(uri, exc) from exc


class _OnToken(Signer):
    """A key on a token; what its library raises is said as an error of the command's caller."""

    def __init__(self, uri: str, signer: Signer) -> None:
        self._uri = uri
        self._signer = signer

    @property
    def public_key(self) -> Key:
        return self._signer.public_key

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Any = None) -> Signer:
        """Abstract in the library, whose own list of schemes this class is not in."""
        raise NotImplementedError("it is made by `load`")

    def sign(self, payload: bytes) -> Signature:
        """Raises ConfigError: the PIN is another, the token is gone, ..."""
        try:
            return self._signer.sign(payload)
        except Exception as exc:  # likewise
            raise _does_not_work(self._uri, exc) from exc


def _does_not_work(uri: str, exc: Exception) -> ConfigError:
    """A token's library says what is wrong in its own ways, sometimes by the name of an error alone."""
    why = f"the token does not work: {str(exc) or type(exc).__name__}"
    return ConfigError(uri, why, f"Is PYKCS11LIB set, the token there, and {PASSPHRASE} its PIN?")
