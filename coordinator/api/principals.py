"""Who asks, and whether that is enough for what is asked."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from fedtide.coordinator.adapters.oidc import NotLetIn, OidcLogin
from fedtide.coordinator.identity import people
from fedtide.fabric.messages.people import ROLES, PrincipalView, Role
from fedtide.fabric.process.web_access import TokenFile

SERVICE = "fts"
"""Begins a service token: fts_ID_SECRET."""
NOBODY_ASKS = PrincipalView(name="local", role="admin", via="nobody asks")
"""Where no token is configured: the API listens on loopback only."""


class Principals:
    """Knows the holders of tokens: the installation's own, programs, and people by OpenID Connect."""

    def __init__(self, local: TokenFile | None, known: Callable[[], people.People], oidc: OidcLogin | None) -> None:
        self.local = local
        self._known = known
        self.oidc = oidc

    async def of(self, headers: Mapping[str, str]) -> PrincipalView | None:
        """Who shows these headers; None: nobody.

        Raises:
            NotLetIn: somebody who is known, and not let in.
            TransientError: the provider does not answer.
        """
        if self.local is None:
            return NOBODY_ASKS
        if self.local.shown_by(headers):
            return PrincipalView(name="admin", role="admin", via="local token")
        scheme, _, shown = headers.get("Authorization", "").partition(" ")
        token = shown.strip()
        if scheme.lower() != "bearer" or not token:
            return None
        if token.startswith(f"{SERVICE}_"):
            return self._program(token)
        return await self.oidc.principal(token) if self.oidc is not None and token.count(".") == 2 else None

    def _program(self, token: str) -> PrincipalView | None:
        _, key, _ = [*token.split("_", 2), "", ""][:3]
        known = self._known().tokens.get(key)
        if known is None or not hmac.compare_digest(known.created.digest, digest_of(token)):
            return None
        if not people.is_good(known, datetime.now(UTC)):
            raise NotLetIn(f"the service token {key} is revoked or has expired", "fedtide token create")
        created = known.created
        return PrincipalView(
            name=f"{created.name} ({key})", role=created.role, via="service token", expires=created.expires_at
        )


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def is_enough(role: Role, needed: Role) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)
