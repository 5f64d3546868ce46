"""Believes ID tokens of one OpenID provider: its keys are fetched, kept, and fetched again when there is a new one.

OpenID Connect Core 1.0, section 3.1.3.7; Discovery 1.0. Where the provider is away, keys that are known stay good.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt

from fedtide.coordinator.config import Oidc
from fedtide.fabric.errors import FedtideError, TransientError
from fedtide.fabric.messages.people import ROLES, LoginView, PrincipalView, Role

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Only such with a public key: a provider's secret is nothing that this process knows."""
KEYS_FOR_S, AGAIN_AFTER_S, LEEWAY_S = 3600.0, 10.0, 60
ANSWER_WITHIN_S = 10.0


class NotLetIn(FedtideError):
    """Whoever shows this is nobody here, or may do nothing."""

    exit_code = 77


class OidcLogin:
    """One provider, as the configuration names it."""

    def __init__(self, config: Oidc) -> None:
        self.config = config
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = self._failed = float("-inf")
        self._document: dict[str, Any] = {}
        self._lock = asyncio.Lock()

    @property
    def view(self) -> LoginView:
        return LoginView(issuer=self.config.issuer, client_id=self.config.client_id, scopes=self.config.scopes)

    async def principal(self, token: str, *, nonce: str = "") -> PrincipalView:
        """Who the holder of an ID token is.

        Raises:
            NotLetIn: it is not of this provider and for this installation, has expired, or its holder has no role.
            TransientError: the provider's keys cannot be fetched.
        """
        try:
            found = jwt.get_unverified_header(token)
            key = await self._key(str(found.get("kid", "")))
            claims = jwt.decode(
                token,
                key.key,
                algorithms=list(ALGORITHMS),
                audience=self.config.audience or self.config.client_id,
                issuer=self.config.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iat", "sub"]},
            )
        except (jwt.PyJWTError, ValueError) as exc:
            raise NotLetIn(f"the ID token is not good: {exc}", "fedtide login") from exc
        if nonce and claims.get("nonce") != nonce:
            raise NotLetIn("the ID token answers another login", "Log in again")
        named = [self.config.name_claim, "email", "sub"]
        if claims.get("email_verified") is False:  # anybody may have written that address
            named = ["sub"]
        name = next((str(claims[c]) for c in named if claims.get(c)), "")
        role = self._role(claims)
        if role is None:
            raise NotLetIn(
                f"{name} has no role here", f"`oidc.roles` names values of the claim {self.config.roles_claim}"
            )
        return PrincipalView(name=name[:200], role=role, via="oidc", expires=datetime.fromtimestamp(claims["exp"], UTC))

    def _role(self, claims: dict[str, Any]) -> Role | None:
        held = claims.get(self.config.roles_claim, [])
        values = held if isinstance(held, list) else str(held).split()
        given = [self.config.roles[v] for v in map(str, values) if v in self.config.roles]
        given += [self.config.default_role] if self.config.default_role else []
        return max(given, key=ROLES.index, default=None)

    async def _key(self, kid: str) -> jwt.PyJWK:
        if kid in self._keys and time.monotonic() < self._fetched + KEYS_FOR_S:
            return self._keys[kid]  # whoever else has to wait for the provider: nobody whose key is known
        async with self._lock:
            now = time.monotonic()
            is_due = now > self._fetched + (KEYS_FOR_S if kid in self._keys else AGAIN_AFTER_S)
            if is_due and now > self._failed + AGAIN_AFTER_S:
                try:
                    await self._fetch_keys()
                except TransientError as exc:
                    self._failed = time.monotonic()
                    if kid not in self._keys:
                        raise
                    log.warning("oidc.keys_not_fetched", extra={"reason": str(exc)})
        if kid in self._keys:
            return self._keys[kid]
        raise jwt.InvalidKeyError("the provider has no such key")

    async def _fetch_keys(self) -> None:
        found = await self.get((await self.document())["jwks_uri"])
        # What it has for other uses or in other ways is none of ours.
        keys = [key for key in found.get("keys", []) if key.get("use", "sig") == "sig"]
        self._keys = {str(key.get("kid", "")): jwt.PyJWK(key) for key in keys if _is_known(key)}
        self._fetched = time.monotonic()

    async def document(self) -> dict[str, Any]:
        """What the provider says of itself. Raises TransientError."""
        if not self._document:
            found = await self.get(f"{self.config.issuer.rstrip('/')}/.well-known/openid-configuration")
            if found.get("issuer") != self.config.issuer:
                raise TransientError(
                    f"the provider says that it is {found.get('issuer')!r}, not {self.config.issuer!r}"
                )
            self._document = found
        return self._document

    async def get(self, url: str) -> dict[str, Any]:
        return await self._answer("GET", url, None)

    async def exchange(self, code: str, verifier: str, redirect: str) -> str:
        """The ID token for a code (RFC 6749, 4.1.3, with PKCE). Raises NotLetIn, TransientError."""
        about = {
            "grant_type": "authorization_code",
            "code": code,
            "code_verifier": verifier,
            "redirect_uri": redirect,
            "client_id": self.config.client_id,
        }
        if self.config.client_secret_file is not None:
            about["client_secret"] = self.config.client_secret_file.read_text(encoding="utf-8").strip()
        found = await self._answer("POST", (await self.document())["token_endpoint"], about)
        if "id_token" not in found:
            raise NotLetIn(f"the provider gives no ID token: {found.get('error', 'no reason')}", "Log in again")
        return str(found["id_token"])

    async def _answer(self, method: str, url: str, data: dict[str, str] | None) -> dict[str, Any]:
        verify: Any = ssl.create_default_context(cafile=str(self.config.ca_file)) if self.config.ca_file else True
        try:
            async with httpx.AsyncClient(verify=verify, timeout=ANSWER_WITHIN_S, trust_env=False) as client:
                found: dict[str, Any] = (await client.request(method, url, data=data)).json()
        except (httpx.HTTPError, ValueError, OSError) as exc:
            raise TransientError(f"the provider {self.config.issuer} does not answer: {exc}") from exc
        return found


def _is_known(key: dict[str, Any]) -> bool:
    try:
        jwt.PyJWK(key)
    except jwt.PyJWTError:
        return False
    return True
