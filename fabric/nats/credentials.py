"""How a process connects to the broker: its credentials, and the CA it trusts. Read again at every connection."""

from __future__ import annotations

import base64
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.jwt import Key
from fedtide.fabric.process.files import write_atomically

_JWT = "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n"
_SEED = "-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user's JWT, and the key that it is about."""

    jwt: str
    key: Key

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """From the text of a `.creds` file; raises MalformedMessage."""
        found = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("-")]
        if len(found) != 2:
            raise MalformedMessage("these are no NATS credentials: a JWT and a seed are expected")
        nats_jwt.read(found[0])
        return cls(found[0], Key.of(found[1]))

    @classmethod
    def load(cls, file: Path) -> Credentials:
        """Raises ConfigError if the file is missing or holds something else."""
        try:
            return cls.parse(file.read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigError(str(file), f"cannot be read: {exc.strerror}", "Enrol, or mount the Secret") from exc
        except (MalformedMessage, ValueError) as exc:
            raise ConfigError(str(file), "does not hold NATS credentials") from exc

    @property
    def text(self) -> str:
        return _JWT.format(self.jwt) + _SEED.format(self.key.seed)

    def save(self, file: Path) -> None:
        """Write the `.creds` file atomically, readable only by its owner."""
        write_secret(file, self.text)

    @property
    def expires(self) -> float:
        """Seconds since the epoch; infinite if they do not."""
        return float(nats_jwt.read(self.jwt).get("exp") or "inf")

    @property
    def lifetime_s(self) -> float | None:
        """From their issue to their end, in seconds; None: they do not end."""
        claims = nats_jwt.read(self.jwt)
        return float(claims["exp"]) - float(claims["iat"]) if claims.get("exp") else None

    @property
    def lifetime_left(self) -> float:
        """Share of their lifetime that is left: 1 when new, 0 or less when expired."""
        claims = nats_jwt.read(self.jwt)
        if not claims.get("exp"):
            return 1.0
        began, ends = float(claims["iat"]), float(claims["exp"])
        return (ends - time.time()) / max(1.0, ends - began)

    @property
    def inbox(self) -> str:
        """The prefix of the subjects on which answers may reach this user (`permissions.inbox`)."""
        claims = nats_jwt.read(self.jwt)
        tags = dict(tag.partition(":")[::2] for tag in claims["nats"].get("tags", []))
        return f"_INBOX.{tags['role']}.{claims['name']}" if "role" in tags else "_INBOX"


@dataclass(frozen=True, slots=True)
class Access:
    """Files that let a process connect; without any it has no credentials and trusts the public CAs."""

    credentials: Path | None = None
    ca: Path | None = None

    def options(self) -> Mapping[str, Any]:
        """Keyword arguments for nats-py. Renewed credentials are used from the next connection on.

        Raises:
            ConfigError: a file is missing or wrong.
        """
        options: dict[str, Any] = {}
        if self.credentials is not None:
            file = self.credentials
            options["user_jwt_cb"] = lambda: Credentials.load(file).jwt.encode()
            options["signature_cb"] = lambda nonce: _signature(Credentials.load(file), nonce)
            options["inbox_prefix"] = Credentials.load(file).inbox.encode()
        if self.ca is not None:
            options["tls"] = trusting(self.ca)
        return options


def _signature(credentials: Credentials, nonce: str) -> bytes:
    return base64.b64encode(credentials.key.sign(nonce.encode()))


def trusting(ca: Path) -> ssl.SSLContext:
    """TLS that believes certificates of `ca` (a PEM file), and no others."""
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as exc:
        raise ConfigError(str(ca), "is no certificate of an authority", "It is ca.crt of the identity Secret") from exc


def write_secret(file: Path, text: str) -> None:
    """A file that only its owner reads, there as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode(), mode=0o600)
