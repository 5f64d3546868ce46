"""What a release authority is told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fedtide.fabric.nats.urls import NatsUrl
from fedtide.fabric.strict import Strict
from fedtide.fabric.trust.keys import PKCS11


class AuthorityConfig(Strict):
    """Of a release authority. Read from a JSON file."""

    nats_url: NatsUrl = Field(description="The hub")
    tenant: str = Field(default="default", description="As for agents")
    credentials: Path | None = Field(default=None, description="Its `.creds` file: signer.creds of the identities")
    ca_file: Path | None = Field(default=None, description="Authority of the broker's certificate; needed for tls://")
    key: str = Field(description="File of its private key (PEM), or `hsm:...` for a token (PKCS #11)")
    roots: Path = Field(description="trust-roots.json: the root that it follows")
    folder: Path = Field(description="Where it keeps the metadata, and what it has signed")

    def below(self, folder: Path) -> AuthorityConfig:
        """The same, with paths that are relative taken as from a folder: that of its file."""
        names = ("credentials", "ca_file", "roots", "folder", *(() if self.key.startswith(PKCS11) else ("key",)))
        return AuthorityConfig.model_validate(
            {**self.model_dump(), **{name: folder / found for name in names if (found := getattr(self, name))}}
            | ({"key": str(folder / self.key)} if "key" in names else {})
        )
